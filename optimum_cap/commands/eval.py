"""`optimum-cli cap eval`: accuracy and perplexity of a model."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_cap.commands.base import (
    CAPSubcommand,
    add_common_flags,
    add_loading_flags,
    check_loading_flags,
    check_model,
    check_output_file,
    loading_options,
)

if TYPE_CHECKING:
    from optimum_cap.evaluation import Evaluation, TaskData


class EvalCommand(CAPSubcommand):
    """Reads the data before it loads the model, and saves the results before reporting an error."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags."""
        parser.description = (
            "Measure accuracy on questions with worked answers, and perplexity. Items that the "
            "model was calibrated on are left out."
        )
        parser.add_argument("model", help="Hub id or folder of the model, dense or pruned")
        parser.add_argument(
            "--tasks",
            default="gsm8k,strategyqa,arc_challenge,wikitext2",
            help="comma-separated tasks; tiny_reasoner is another (default: %(default)s)",
        )
        parser.add_argument(
            "-o", "--output", type=Path, metavar="FILE", help="JSON file to write, e.g. for compare"
        )
        add_evaluation_flags(parser)
        add_common_flags(parser)

    def prepare(self) -> "TaskData":
        """Check the output file and the numbers, and read the data and the model's config."""
        args = self.args
        if args.output is not None:
            _check_output_file(args.output)
        from optimum_cap.evaluation import check_counts, load_task_data

        check_counts(args.limit, args.batch_size)
        data = load_task_data(args.tasks, args.data_dir)
        check_loading_flags(args)
        check_model(args.model, args)
        return data

    def execute(self, prepared: "TaskData") -> None:
        """Evaluate, write the file, print the table."""
        evaluation = evaluate_model(self.args.model, prepared, self.args)
        if self.args.output is not None:
            evaluation.save(self.args.output)
        print(evaluation.table())
        print(f"time: {evaluation.seconds:.1f} s")
        if self.args.output is not None:
            print(f"saved: {self.args.output}")
        if evaluation.errors:
            raise RuntimeError(
                "; ".join(f"{name}: {text}" for name, text in evaluation.errors.items())
            )


def add_evaluation_flags(parser: ArgumentParser, of_the_files: bool = False) -> None:
    """Add the flags that control how a model is evaluated.

    Args:
        parser: The parser.
        of_the_files: Whether limit and seed are those of saved evaluations by default; the default
            of both is then `None`.
    """
    add = parser.add_argument
    files = "those of the files, else " if of_the_files else ""
    add(
        "--limit",
        type=int,
        metavar="N",
        help=f"questions or windows per task (default: {files}all)",
    )
    add(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with the data files (default: download from the Hub)",
    )
    add(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="questions per batch (default: 32)",
    )
    add(
        "--seed",
        type=int,
        default=None if of_the_files else 0,
        help=f"seed for the sample that --limit draws (default: {files}0)",
    )
    add_loading_flags(parser)


def evaluate_model(name: str, data: "TaskData", args: Namespace) -> "Evaluation":
    """Load a model and evaluate it with the settings in `args`."""
    from optimum_cap.evaluation import evaluate

    return evaluate(
        name,
        data=data,
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
        **loading_options(args),
    )


def _check_output_file(path: Path) -> None:
    if path.suffix != ".json":
        raise ValueError(
            f"the output {path} must end in .json, so that compare can tell it from a model"
        )
    check_output_file(path)
