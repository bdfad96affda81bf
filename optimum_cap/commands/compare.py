"""`optimum-cli cap compare`: pruned models against a dense one, with significance tests."""

import textwrap
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_cap.commands.base import (
    CAPSubcommand,
    IncompleteError,
    add_general_flags,
    add_hub_flags,
    check_loading_flags,
    check_model,
)
from optimum_cap.commands.eval import (
    TASKS,
    add_evaluation_flags,
    add_to_card,
    add_to_card_flag,
    check_cards,
    check_evaluation_flags,
    evaluate_model,
    read_task_data,
)
from optimum_cap.commands.opening import evaluation_lines
from optimum_cap.commands.parser import REQUIRED, CommandParser

if TYPE_CHECKING:
    from optimum_cap.evaluation import Evaluation, TaskData


@dataclass(frozen=True)
class _Prepared:
    tasks: list[str] | None
    data: "TaskData"
    saved: "dict[str, Evaluation]"


class CompareCommand(CAPSubcommand):
    """Compares models, which are evaluated first, and files written by `eval -o`."""

    KEEPS_RESULTS: ClassVar[bool] = True

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "DENSE PRUNED [PRUNED ...]",
            "Compare pruned models with a dense one over the questions that both answered. Each is "
            "a model or a JSON file written by `optimum-cli cap eval -o`.",
            "org/model pruned --tasks gsm8k --limit 100",
            "dense.json pruned.json other.json",
            page="evaluation",
        )
        parser.add_model("dense model, or its JSON file", "dense")
        parser.group(REQUIRED)(
            "pruned", metavar="PRUNED", nargs="+", help="pruned models, or their JSON files"
        )
        parser.group(TASKS)(
            "--tasks",
            help="comma-separated tasks (default: those in the files, else those of eval)",
        )
        add_evaluation_flags(parser, of_the_files=True)
        add_to_card_flag(parser, "each pruned model")
        add_hub_flags(parser)
        add_general_flags(parser)

    def opening(self) -> list[str]:
        """Return the models that are not files, tasks, device and resume folder."""
        names = [self.args.dense, *self.args.pruned]
        models = [name for name in dict.fromkeys(names) if not name.endswith(".json")]
        with_files = len(models) < len(set(names))
        return evaluation_lines(self.args, models, with_files) if models else []

    def prepare(self) -> _Prepared:
        """Read the files and check the tasks; if there is a model to evaluate, read the data."""
        args = self.args
        from optimum_cap.evaluation import DEFAULT_TASKS, Evaluation, resolve_tasks, result_name

        names = [args.dense, *args.pruned]
        if args.add_to_card:
            check_cards(args.pruned)
        saved = {name: Evaluation.load(name) for name in names if name.endswith(".json")}
        named = None if args.tasks is None else resolve_tasks(args.tasks)
        tasks = None if named is None else [result_name(name) for name in named]
        for name, evaluation in saved.items():
            if missing := [task for task in tasks or () if task not in evaluation.tasks]:
                raise ValueError(
                    f"{name} holds no task {missing[0]!r}, only {', '.join(evaluation.tasks)}: "
                    "evaluate that model again with this task"
                )
        data: TaskData = {}
        if len(saved) < len(set(names)):
            if args.log_samples is not None and args.log_samples.suffix == ".jsonl":
                raise ValueError(
                    f"--log-samples {args.log_samples} is a file, but compare writes a folder per "
                    "model: name a folder"
                )
            _take_draw(args, saved)
            check_evaluation_flags(args)
            in_files = [task for evaluation in saved.values() for task in evaluation.tasks]
            if named is None:
                _check_files_of(in_files)
            data = read_task_data(named or in_files or list(DEFAULT_TASKS), args)
            check_loading_flags(args)
            for name in names:
                if name not in saved:
                    check_model(name, args)
        return _Prepared(tasks, data, saved)

    def execute(self, prepared: _Prepared) -> dict[str, Any]:
        """Evaluate the models that are not files, and show a table per pruned model."""
        from optimum_cap.evaluation import compare, comparison_table

        args = self.args
        evaluations = dict(prepared.saved)
        logs = _sample_folders(args)
        for name in dict.fromkeys([args.dense, *args.pruned]):
            if name not in evaluations:
                evaluations[name] = evaluate_model(name, prepared.data, args, logs.get(name))
        dense, comparisons = evaluations[args.dense], []
        for name in args.pruned:
            self.answer(comparison_table(dense, evaluations[name], prepared.tasks) + "\n")
            tasks = {
                task: found if isinstance(found, str) else [asdict(each) for each in found]
                for task, found in compare(dense, evaluations[name], prepared.tasks).items()
            }
            comparisons.append({"dense": args.dense, "pruned": name, "tasks": tasks})
            if args.add_to_card:
                self.say(add_to_card(name, evaluations[name], dense) + "\n")
        self.say(_NOTES)
        errors = [
            f"{task} of {name}: {text}"
            for name, evaluation in evaluations.items()
            for task, text in evaluation.errors.items()
            if prepared.tasks is None or task in prepared.tasks
        ]
        values = {"comparisons": comparisons}
        if errors:
            raise IncompleteError("; ".join(errors), values)
        return values


_NOTES = textwrap.fill(
    "Over the items that both have: for shares, p is from the exact McNemar test and the interval "
    "is Newcombe's; for lengths, p is from a sign-flip test and the interval a paired bootstrap of "
    "the ratio; for perplexity, the interval is a paired bootstrap over windows. An interval that "
    "contains 0 is not a statistically significant difference.",
    80,
)


def _check_files_of(tasks: list[str]) -> None:
    """Check that the files of tasks in results, which do not store folders, can be found.

    Raises:
        FileNotFoundError: A file is not in the current folder.
    """
    from optimum_cap.evaluation import LOSS_PREFIX

    for task in tasks:
        file = task.removeprefix(LOSS_PREFIX)
        if file != task and not Path(file).is_file():
            raise FileNotFoundError(
                f"the results of {task} do not say in which folder the file is, and it is not in "
                f"the current one: name it with --tasks {LOSS_PREFIX}FOLDER/{file}"
            )


def _take_draw(args: Namespace, saved: "dict[str, Evaluation]") -> None:
    """Set missing flags to the values in the files, to use the same items and prompts.

    Raises:
        ValueError: The files have different ones.
    """
    draw = (("limit", None), ("seed", 0), ("num_fewshot", None), ("max_new_tokens", None))
    for name, default in draw:
        if getattr(args, name) is not None:
            continue
        values = {file: evaluation.settings.get(name) for file, evaluation in saved.items()}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{value} in {file}" for file, value in values.items())
            raise ValueError(
                f"the files were evaluated with different values of {name} ({shown}): name one "
                f"with --{name.replace('_', '-')}, or evaluate the models again"
            )
        setattr(args, name, next(iter(values.values()), default))


def _sample_folders(args: Namespace) -> dict[str, Path]:
    """Return the samples folder of each model, named after the end of the model's name."""
    if args.log_samples is None:
        return {}
    folders: dict[str, Path] = {}
    for name in dict.fromkeys([args.dense, *args.pruned]):
        folder = args.log_samples / Path(name).name
        if folder in folders.values():
            folder = args.log_samples / name.strip("/").replace("/", "_")
        folders[name] = folder
    return folders
