"""`optimum-cli cap compare`: pruned models against a dense one, with significance tests."""

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum_cap.commands.base import CAPSubcommand, add_common_flags
from optimum_cap.commands.eval import add_evaluation_flags, check_model, evaluate_model

if TYPE_CHECKING:
    from optimum_cap.evaluation import Evaluation, TaskData


@dataclass(frozen=True)
class _Prepared:
    tasks: list[str] | None
    data: "TaskData"
    saved: "dict[str, Evaluation]"


class CompareCommand(CAPSubcommand):
    """Compares models, which it evaluates first, and files written by `eval -o`."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags."""
        parser.description = (
            "Compare pruned models with a dense one over the questions that both answered. Each is "
            "a model or a JSON file written by `optimum-cli cap eval -o`."
        )
        parser.add_argument("dense", help="dense model, or its JSON file")
        parser.add_argument("pruned", nargs="+", help="pruned models, or their JSON files")
        parser.add_argument(
            "--tasks",
            help="comma-separated tasks (default: those in the files, else those of eval)",
        )
        add_evaluation_flags(parser)
        add_common_flags(parser)

    def prepare(self) -> _Prepared:
        """Read the files and check the tasks; if there is a model to evaluate, read the data."""
        args = self.args
        from optimum_cap.evaluation import DEFAULT_TASKS, Evaluation, resolve_tasks

        names = [args.dense, *args.pruned]
        saved = {name: Evaluation.load(name) for name in names if name.endswith(".json")}
        tasks = None if args.tasks is None else resolve_tasks(args.tasks)
        for name, evaluation in saved.items():
            if missing := [task for task in tasks or () if task not in evaluation.tasks]:
                raise ValueError(
                    f"{name} holds no task {missing[0]!r}, only {', '.join(evaluation.tasks)}: "
                    "evaluate that model again with this task"
                )
        data: TaskData = {}
        if len(saved) < len(set(names)):
            from optimum_cap.evaluation import check_counts, load_task_data

            check_counts(args.limit, args.batch_size)
            in_files = [task for evaluation in saved.values() for task in evaluation.tasks]
            data = load_task_data(tasks or in_files or DEFAULT_TASKS, args.data_dir)
            for name in names:
                if name not in saved:
                    check_model(name, args)
        return _Prepared(tasks, data, saved)

    def execute(self, prepared: _Prepared) -> None:
        """Evaluate the models that are not files, and print a table per pruned model."""
        from optimum_cap.evaluation import comparison_table

        args = self.args
        evaluations = dict(prepared.saved)
        for name in dict.fromkeys([args.dense, *args.pruned]):
            if name not in evaluations:
                evaluations[name] = evaluate_model(name, prepared.data, args)
        for name in args.pruned:
            print(comparison_table(evaluations[args.dense], evaluations[name], prepared.tasks))
            print()
        print(
            "Over the items that both have: p is from the exact McNemar test, the interval is "
            "Newcombe's for\npaired accuracies and a paired bootstrap over windows for perplexity. "
            "An interval that contains 0\nis not a statistically significant difference."
        )
        errors = [
            f"{task} of {name}: {text}"
            for name, evaluation in evaluations.items()
            for task, text in evaluation.errors.items()
            if prepared.tasks is None or task in prepared.tasks
        ]
        if errors:
            raise RuntimeError("; ".join(errors))
