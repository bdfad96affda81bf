"""`optimum-cli cap eval`: accuracy and perplexity of a model."""

import dataclasses
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_cap.commands.base import (
    CAPSubcommand,
    IncompleteError,
    add_general_flags,
    add_hub_flags,
    add_loading_flags,
    check_has_lm_head,
    check_loading_flags,
    check_output_file,
    check_resume_folder,
    loading_options,
)
from optimum_cap.commands.opening import evaluation_lines
from optimum_cap.commands.parser import OUTPUT, RUN, CommandParser
from optimum_cap.text import format_duration

if TYPE_CHECKING:
    from optimum_cap.evaluation import Evaluation, TaskData


TASKS = "tasks"  # title of a group of flags


class EvalCommand(CAPSubcommand):
    """Reads the data before it loads the model, and saves the results before reporting an error."""

    KEEPS_RESULTS: ClassVar[bool] = True

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "MODEL",
            "Measure accuracy on questions with worked answers, the length of answers, and "
            "perplexity. Items that the model was calibrated on are left out. Finished batches "
            "are stored: run the command again to resume.",
            "pruned --tasks gsm8k,wikitext2 -o pruned.json",
            "pruned --tasks gsm8k --limit 100 --add-to-card",
            page="evaluation",
        )
        parser.add_model("Hub id or folder of the model, dense or pruned")
        parser.group(TASKS)(
            "--tasks",
            default="gsm8k,strategyqa,arc_challenge,wikitext2",
            help="comma-separated tasks; also loss:FILE for your own answers, gsm8k_loss, "
            "lm_eval:NAME and others (default: %(default)s)",
        )
        parser.group(OUTPUT)(
            "-o", "--output", type=Path, metavar="FILE", help="JSON file to write, e.g. for compare"
        )
        add_evaluation_flags(parser)
        add_to_card_flag(parser, "the pruned model")
        add_hub_flags(parser)
        add_general_flags(parser)

    def opening(self) -> list[str]:
        """Return model and size, tasks, device and resume folder."""
        return evaluation_lines(self.args, [self.args.model])

    def prepare(self) -> "TaskData":
        """Check the output file and the numbers, and read the data and the model's config."""
        args = self.args
        if args.output is not None:
            _check_output_file(args.output)
        check_evaluation_flags(args)
        if args.add_to_card:
            check_cards([args.model])
        data = read_task_data(args.tasks, args)
        check_loading_flags(args)
        check_has_lm_head(args.model, args)
        return data

    def execute(self, prepared: "TaskData") -> dict[str, Any]:
        """Evaluate, write the file, show the table."""
        evaluation = evaluate_model(self.args.model, prepared, self.args, self.args.log_samples)
        if self.args.output is not None:
            evaluation.save(self.args.output)
        self.answer(evaluation.table())
        self.say(f"time          {format_duration(evaluation.seconds)}")
        values = evaluation.to_dict()
        if self.args.output is not None:
            self.say(f"saved         {self.args.output}")
        if self.args.add_to_card:
            self.say(add_to_card(self.args.model, evaluation))
        if evaluation.errors:
            raise IncompleteError(
                "; ".join(f"{name}: {text}" for name, text in evaluation.errors.items()), values
            )
        return values


def add_evaluation_flags(parser: CommandParser, of_the_files: bool = False) -> None:
    """Add the flags that control how a model is evaluated.

    Args:
        parser: The parser.
        of_the_files: Whether limit and seed default to those of saved evaluations; the default of
            both flags is then `None`.
    """
    add = parser.group(TASKS)
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
        help=f"seed for the sample that --limit draws, and worked examples (default: {files}0)",
    )
    add(
        "--num-fewshot",
        type=int,
        metavar="N",
        help=f"worked examples in each prompt (default: {files}0 with a chat template, else 5)",
    )
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"longest answer in tokens (default: {files}that of the task)",
    )
    add(
        "--include-path",
        type=Path,
        metavar="DIR",
        help="folder with definitions of tasks for lm_eval:NAME (default: those of the harness)",
    )
    parser.group(OUTPUT)(
        "--log-samples",
        type=Path,
        metavar="PATH",
        help="folder"
        + ("" if of_the_files else ", or file ending in .jsonl,")
        + " for prompts, responses, answers and likelihoods (default: None)",
    )
    parser.group(RUN)(
        "--resume-dir",
        metavar="DIR",
        help="folder for finished batches, so that an interrupted run resumes "
        "(default: optimum_cap/resume in HF_HOME)",
    )
    add_loading_flags(parser)


def add_to_card_flag(parser: CommandParser, what: str) -> None:
    """Add the flag that shows the results on model cards.

    Args:
        parser: The parser.
        what: Description of the models.
    """
    parser.group(OUTPUT)(
        "--add-to-card",
        action="store_true",
        help=f"show the results on the model card of {what}, which must be a folder "
        "(default: False)",
    )


def check_cards(models: Iterable[str]) -> None:
    """Check that results can be added to the cards of models.

    Raises:
        ValueError: A model is not a folder of a CAP checkpoint, or has no card that can be read.
        OSError: A folder cannot be written to.
    """
    from optimum_cap.publishing import check_has_card

    for model in models:
        if model.endswith(".json"):
            raise ValueError(
                f"--add-to-card needs the folder of each pruned model, got the file {model}: name "
                "the folder (answers that were generated before are reused)"
            )
        check_has_card(model)


def add_to_card(model: str, evaluation: "Evaluation", dense: "Evaluation | None" = None) -> str:
    """Add the finite results to the card of a model; return a message that says where."""
    from optimum_cap.checkpoint import CARD_NAME
    from optimum_cap.publishing import add_results

    tasks = {
        name: result for name, result in evaluation.tasks.items() if name not in evaluation.errors
    }
    if not tasks:
        return "card          unchanged, as no result is finite"
    add_results(model, dataclasses.replace(evaluation, tasks=tasks), dense)
    return f"card          {Path(model) / CARD_NAME}"


def check_evaluation_flags(args: Namespace) -> None:
    """Check the flags that control how a model is evaluated.

    Raises:
        ValueError: A number is out of range, or samples cannot be logged to the path.
        FileNotFoundError: The folder of the samples does not exist.
        OSError: The resume folder cannot be written to.
    """
    from optimum_cap.evaluation import check_counts, check_sample_log

    check_counts(args.limit, args.batch_size, args.num_fewshot, args.max_new_tokens)
    if args.log_samples is not None:
        check_sample_log(args.log_samples)
    check_resume_folder(args.resume_dir)


def read_task_data(tasks: "str | list[str]", args: Namespace) -> "TaskData":
    """Read the data of tasks."""
    from optimum_cap.evaluation import load_task_data

    return load_task_data(tasks, args.data_dir, args.num_fewshot, args.include_path)


def evaluate_model(
    name: str, data: "TaskData", args: Namespace, log_samples: Path | None
) -> "Evaluation":
    """Load a model and evaluate it with the settings in `args`."""
    from optimum_cap.evaluation import evaluate
    from optimum_cap.runtime import default_folder

    return evaluate(
        name,
        data=data,
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
        num_fewshot=args.num_fewshot,
        max_new_tokens=args.max_new_tokens,
        log_samples=log_samples,
        resume_dir=args.resume_dir or default_folder(),
        **loading_options(args),
    )


def _check_output_file(path: Path) -> None:
    if path.suffix != ".json":
        raise ValueError(
            f"the output {path} must end in .json, so that compare can tell it from a model"
        )
    check_output_file(path)
