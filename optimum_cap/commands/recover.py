"""`optimum-cli cap recover`: train a pruned model to reproduce the dense model's predictions."""

import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_cap.commands.base import (
    CAPSubcommand,
    add_general_flags,
    add_hub_flags,
    add_trust_remote_code,
    check_has_lm_head,
    check_output_folder,
    check_prunable,
    check_resume_folder,
)
from optimum_cap.commands.config_flags import add_config_flags, config_values
from optimum_cap.commands.opening import opening_lines
from optimum_cap.commands.parser import DATA, REQUIRED, CommandParser
from optimum_cap.commands.prune import (
    calibration_examples,
    load_tokenizer,
)
from optimum_cap.text import format_duration, labelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELDS = ("scored_tokens", "max_length", "resume_dir", "seed")


@dataclass(frozen=True)
class PreparedRecovery:
    """The values that `prepare` passes to `execute`.

    Attributes:
        folder: Folder of the pruned model, downloaded if needed.
        dense: Name of the dense model, and its revision on the Hub, if known.
        tokenizer: The tokenizer.
        options: Arguments of `recover`.
    """

    folder: Path
    dense: tuple[str, str | None]
    tokenizer: "PreTrainedTokenizerBase"
    options: dict[str, Any]


class RecoverCommand(CAPSubcommand):
    """Distils the dense model into the pruned one; zeros stay zeros."""

    KEEPS_RESULTS = True

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "MODEL -o DIR",
            "Train a pruned model for some steps to predict what the dense model predicts. Its "
            "zeros stay zeros.",
            "pruned -o recovered --dense org/model --steps 200",
            page="after_pruning",
        )
        parser.add_model("folder or Hub id of the pruned model")
        parser.group(REQUIRED)(
            "-o", "--output", required=True, type=Path, metavar="DIR", help="new folder to write"
        )
        add = parser.group("training")
        add(
            "--dense",
            metavar="MODEL",
            help="Hub id or folder of the dense model (default: that of the pruning record)",
        )
        add("--steps", type=int, default=200, help="steps of training (default: 200)")
        add("--batch-size", type=int, default=4, help="examples in a step (default: 4)")
        add(
            "--learning-rate",
            type=float,
            help="peak of the learning rate (default: 1e-4, or 1e-3 with --lora-rank)",
        )
        add(
            "--lora-rank",
            type=int,
            metavar="RANK",
            help="train adapters of this rank and merge them (default: train all weights)",
        )
        add(
            "--hidden-states",
            type=float,
            default=0.0,
            metavar="WEIGHT",
            help="weight of the relative error of hidden states in the loss (default: 0)",
        )
        parser.group(DATA)(
            "--num-samples",
            type=int,
            default=512,
            help="examples in all, a tenth of which (at most 32) is left out (default: 512)",
        )
        add_config_flags(parser, _FIELDS)
        add_trust_remote_code(parser)
        add_hub_flags(parser)
        add_general_flags(parser)

    def opening(self) -> list[str]:
        """Return model and size, data and resume folder."""
        dense = self.args.dense or "the dense model of its record"
        aim = f"{self.args.steps} steps to match {dense}"
        return opening_lines(self.args, "training", aim, device_map="auto")

    def prepare(self) -> PreparedRecovery:
        """Check output, both models, tokenizer, data and settings."""
        args = self.args
        check_output_folder(args.output, args.model)

        from optimum_cap.checkpoint import folder_of_model
        from optimum_cap.config import CAPConfig, effective
        from optimum_cap.runtime import default_folder
        from optimum_cap.training import check_recovery_settings

        values = config_values(vars(args))
        config = CAPConfig(sparsity=0.5, **effective({"resume_dir": default_folder()}, values))
        check_recovery_settings(
            args.steps,
            args.batch_size,
            config.num_samples,
            args.learning_rate,
            args.lora_rank,
            args.hidden_states,
        )
        check_resume_folder(values.get("resume_dir"))
        check_prunable(args.model, args, may_be_pruned=True)
        check_has_lm_head(args.model, args)
        dense = _dense_model(args)
        tokenizer = load_tokenizer(args)
        calibration_examples(config, tokenizer, args)
        folder = folder_of_model(args.model, revision=args.revision, token=args.token)
        options = {
            "dataset": config.dataset,
            "steps": args.steps,
            "batch_size": args.batch_size,
            "num_samples": config.num_samples,
            "learning_rate": args.learning_rate,
            "lora_rank": args.lora_rank,
            "hidden_states": args.hidden_states,
            "scored_tokens": config.scored_tokens,
            "max_length": config.max_length,
            "seed": config.seed,
            "resume_dir": config.resume_dir,
        }
        return PreparedRecovery(Path(folder), dense, tokenizer, options)

    def execute(self, prepared: PreparedRecovery) -> dict[str, Any]:
        """Train, save, and print the improvement."""
        from optimum_cap.checkpoint import inspect_checkpoint, save_smaller
        from optimum_cap.commands.summary import summary_rows
        from optimum_cap.models import load_model
        from optimum_cap.training import recover

        args = self.args
        start = time.monotonic()
        placement = {"dtype": "auto", "trust_remote_code": args.trust_remote_code}
        model = load_model(str(prepared.folder), **placement)
        name, revision = prepared.dense
        dense = load_model(name, revision=revision or "main", token=args.token, **placement)
        recovery = recover(model, dense, prepared.tokenizer, **prepared.options)
        save_smaller(recovery.model, args.output, prepared.folder)
        rows = []
        if getattr(model, "pruning_record", None) is not None:
            rows = summary_rows(inspect_checkpoint(str(args.output)))
        before, after = recovery.divergence_before, recovery.divergence_after
        seconds = time.monotonic() - start
        rows += [
            (
                "divergence",
                f"{before:.4f} -> {after:.4f} nats per token from the dense model, on examples "
                "left out",
            ),
            ("steps", f"{recovery.steps}, the best one was {recovery.best_step}"),
            ("time", format_duration(seconds)),
            ("saved", str(args.output)),
        ]
        self.say(labelled(rows))
        return {
            "saved": str(args.output),
            "seconds": seconds,
            "divergence_before": before,
            "divergence_after": after,
            "steps": recovery.steps,
            "best_step": recovery.best_step,
        }


def _dense_model(args: Namespace) -> tuple[str, str | None]:
    """Return name and revision of the dense model, as given or from the record.

    Raises:
        ValueError: The record names no model on the Hub.
    """
    if args.dense is not None:
        # --revision refers to the pruned model.
        check_prunable(args.dense, Namespace(**{**vars(args), "revision": None}))
        return str(args.dense), None

    from optimum_cap.checkpoint import inspect_checkpoint

    record = inspect_checkpoint(args.model, revision=args.revision, token=args.token).record
    if record.base_model is None or record.base_model.startswith("."):
        raise ValueError(
            f"the record of {args.model} does not say where its dense model "
            f"({record.base_model or 'unknown'}) is: name it with --dense"
        )
    return record.base_model, record.base_revision
