"""`optimum-cli cap generate`: save the answers of a model to the prompts of a data set."""

import json
import shlex
import time
from pathlib import Path
from typing import Any

from optimum_cap.commands.base import (
    CAPSubcommand,
    add_general_flags,
    add_hub_flags,
    add_loading_flags,
    check_has_lm_head,
    check_loading_flags,
    check_output_file,
    check_prunable,
    check_resume_folder,
    loading_options,
)
from optimum_cap.commands.config_flags import add_config_flags, config_values
from optimum_cap.commands.opening import opening_lines
from optimum_cap.commands.parser import OUTPUT, REQUIRED, CommandParser
from optimum_cap.commands.prune import (
    Prepared,
    calibration_examples,
    load_tokenizer,
)
from optimum_cap.text import format_duration, labelled

_FIELDS = (
    "num_samples",
    "temperature",
    "top_p",
    "max_new_tokens",
    "answer_attempts",
    "answer_selection",
    "answer_candidates",
    "max_length",
    "memory_budget",
    "resume_dir",
    "seed",
)
_SUFFIXES = (".jsonl", ".json")  # suffixes of readable data files


class GenerateCommand(CAPSubcommand):
    """Writes the data that `cap prune --answers model` would generate, for `--dataset`."""

    KEEPS_RESULTS = True

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "MODEL -o FILE",
            "Let a model answer the prompts of a data set, and save the answers.",
            "org/model -o answers.jsonl --num-samples 64",
            page="calibration",
        )
        parser.add_model("Hub id or folder of the model that answers")
        parser.group(REQUIRED)(
            "-o",
            "--output",
            required=True,
            type=Path,
            metavar="FILE",
            help="file to write, .jsonl: prompt, completion and metadata of one answer per line",
        )
        parser.group(OUTPUT)(
            "--overwrite", action="store_true", help="replace the output file if it exists"
        )
        add_config_flags(parser, _FIELDS)
        add_loading_flags(parser)
        add_hub_flags(parser)
        add_general_flags(parser)

    def opening(self) -> list[str]:
        """Return model and size, data, device and resume folder."""
        return opening_lines(self.args, "answering with", "its own answers")

    def prepare(self) -> Prepared:
        """Check output, settings, tokenizer and data."""
        args = self.args
        check_output_file(args.output)
        if args.output.suffix not in _SUFFIXES:
            raise ValueError(
                f"the output {args.output} must end in {' or '.join(_SUFFIXES)}, so that "
                "`--dataset` can read it: choose another name"
            )
        if args.output.exists() and not args.overwrite:
            raise ValueError(f"the output {args.output} exists: pass --overwrite to replace it")

        from optimum_cap.config import CAPConfig, effective
        from optimum_cap.runtime import ProcessGroup, default_folder

        process_group = ProcessGroup.current()
        process_group.silence_other_ranks()
        check_loading_flags(args, process_group.size)
        # CAPConfig requires pruning settings, on which answers do not depend.
        fields = {"sparsity": 0.5, "answers": "model", **config_values(vars(args))}
        config = CAPConfig(**effective({"resume_dir": default_folder()}, fields))
        check_resume_folder(fields.get("resume_dir"))
        check_prunable(args.model, args, may_be_pruned=True)
        check_has_lm_head(args.model, args)
        tokenizer = load_tokenizer(args)
        _check_sources(config.dataset)
        calibration_examples(config, tokenizer, args)
        process_group.all_gather(None)  # no process may write before all have checked the output
        return Prepared(config, tokenizer, process_group)

    def execute(self, prepared: Prepared) -> dict[str, Any] | None:
        """Generate the answers, and save them."""
        from optimum_cap.checkpoint import describe_answers
        from optimum_cap.generation import answer_prompts, trace_rows
        from optimum_cap.models import load_model
        from optimum_cap.runtime import write_atomically

        args = self.args
        start = time.monotonic()
        options = loading_options(args, prepared.process_group)
        model = load_model(args.model, **options)
        answered = answer_prompts(
            model, prepared.tokenizer, prepared.config, prepared.process_group
        )
        prepared.process_group.shutdown()
        if prepared.process_group.rank:
            return None  # every process has all answers; rank 0 saves them
        rows = trace_rows(answered.answers)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(args.output, "".join(lines).encode())
        seconds = time.monotonic() - start
        rows_shown = [
            ("answers", describe_answers(answered.record)),
            ("time", format_duration(seconds)),
            ("saved", str(args.output)),
        ]
        self.say(labelled(rows_shown))
        self.say(
            f"\nCalibrate on them with\n\noptimum-cli cap prune {shlex.quote(args.model)} -o DIR "
            f"--sparsity 0.5 --dataset {shlex.quote(str(args.output))} --num-samples {len(rows)}"
        )
        return {"saved": str(args.output), "seconds": seconds, "answers": answered.record}


def _check_sources(dataset: object) -> None:
    """Check that all data sets have prompts, so that each row of the file is an answer.

    Raises:
        ValueError: A data set has plain texts.
    """
    from optimum_cap.data import has_prompts, load_sources

    texts = [source.name for source in load_sources(dataset) if not has_prompts(source)]
    if texts:
        raise ValueError(
            f"data set {texts[0]!r} has plain texts, which are no prompts to answer: leave it out, "
            "and name it besides the file of answers in --dataset of `cap prune`"
        )
