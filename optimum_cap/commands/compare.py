"""`optimum-cli cap compare`: models side by side, with what chance alone does."""

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
    """Evaluates the arguments that are models; the others are files that `eval -o` wrote."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags."""
        parser.description = (
            "Compare pruned models with a dense one, each a model or a JSON file that "
            "`optimum-cli cap eval -o` wrote, over the questions that both have."
        )
        parser.add_argument("dense", help="model or JSON file to compare with")
        parser.add_argument("pruned", nargs="+", help="models or JSON files to compare")
        parser.add_argument(
            "--tasks", help="tasks, with commas (default: those of the files, else as in eval)"
        )
        add_evaluation_flags(parser)
        add_common_flags(parser)

    def prepare(self) -> _Prepared:
        """Read the files, check the tasks, and read the data if there is a model to evaluate."""
        args = self.args
        from optimum_cap.evaluation import DEFAULT_TASKS, Evaluation, resolve_tasks

        names = [args.dense, *args.pruned]
        saved = {name: Evaluation.load(name) for name in names if name.endswith(".json")}
        tasks = None if args.tasks is None else resolve_tasks(args.tasks)
        for name, found in saved.items():
            if missing := [task for task in tasks or () if task not in found.tasks]:
                raise ValueError(
                    f"{name} holds no task {missing[0]!r}, only {', '.join(found.tasks)}: "
                    "evaluate that model again with this task"
                )
        data: TaskData = {}
        if len(saved) < len(set(names)):
            from optimum_cap.evaluation import check_counts, load_task_data

            check_counts(args.limit, args.batch_size)
            in_files = [task for found in saved.values() for task in found.tasks]
            data = load_task_data(tasks or in_files or DEFAULT_TASKS, args.data_dir)
            for name in names:
                if name not in saved:
                    check_model(name, args)
        return _Prepared(tasks, data, saved)

    def execute(self, prepared: _Prepared) -> None:
        """Evaluate what is no file, and print a table per pruned model."""
        from optimum_cap.evaluation import comparison_table

        args = self.args
        found = dict(prepared.saved)
        for name in dict.fromkeys([args.dense, *args.pruned]):
            if name not in found:
                found[name] = evaluate_model(name, prepared.data, args)
        for name in args.pruned:
            print(comparison_table(found[args.dense], found[name], prepared.tasks))
            print()
        print(
            "Over the items that both have: p is the exact McNemar test, the interval Newcombe's "
            "for paired\naccuracies, a paired bootstrap over windows for perplexity. An interval "
            "that holds 0 is no difference shown."
        )
        errors = [
            f"{task} of {name}: {text}"
            for name, result in found.items()
            for task, text in result.errors.items()
            if prepared.tasks is None or task in prepared.tasks
        ]
        if errors:
            raise RuntimeError("; ".join(errors))
