"""`optimum-cli cap recover`: train a pruned model to predict what the dense one predicts."""

import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_cap.commands.base import (
    CAPSubcommand,
    add_common_flags,
    add_trust_remote_code,
    check_has_lm_head,
    check_output_folder,
    check_prunable,
    check_resume_folder,
)
from optimum_cap.commands.prune import (
    add_config_flags,
    calibration_examples,
    config_values,
    load_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELDS = ("scored_tokens", "max_length", "resume_dir", "seed")


@dataclass(frozen=True)
class PreparedRecovery:
    """What `prepare` hands to `execute`.

    Attributes:
        folder: Folder of the pruned model, downloaded if need be.
        dense: Name of the dense model, and its revision on the Hub, if known.
        tokenizer: The tokenizer.
        options: Keywords of `recover`.
    """

    folder: Path
    dense: tuple[str, str | None]
    tokenizer: "PreTrainedTokenizerBase"
    options: dict[str, Any]


class RecoverCommand(CAPSubcommand):
    """Distils the dense model into the pruned one; zeros stay zeros."""

    KEEPS_RESULTS = True

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags."""
        parser.description = (
            "Train a pruned model for some steps to predict what the dense model predicts. Its "
            "zeros stay zeros."
        )
        add = parser.add_argument
        add("-m", "--model", required=True, help="folder or Hub id of the pruned model")
        add("-o", "--output", required=True, type=Path, metavar="DIR", help="new folder to write")
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
        add(
            "--num-samples",
            type=int,
            default=512,
            help="examples in all, a tenth of which (at most 32) is left out (default: 512)",
        )
        add_config_flags(parser, _FIELDS)
        add_trust_remote_code(parser)
        add_common_flags(parser)

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

    def execute(self, prepared: PreparedRecovery) -> None:
        """Train, save, and print what was gained."""
        from optimum_cap.checkpoint import inspect_checkpoint, save_smaller
        from optimum_cap.commands.summary import print_summary
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
        if getattr(model, "pruning_record", None) is not None:
            print_summary(inspect_checkpoint(str(args.output)))
        print(
            f"divergence    {recovery.divergence_before:.4f} -> {recovery.divergence_after:.4f} "
            "nats per token from the dense model, on examples left out"
        )
        print(f"steps         {recovery.steps}, the best one was {recovery.best_step}")
        print(f"time          {time.monotonic() - start:.1f} s")
        print(f"saved         {args.output}")


def _dense_model(args: Namespace) -> tuple[str, str | None]:
    """Return name and revision of the dense model, which is the given one or that of the record.

    Raises:
        ValueError: The record names no model of the Hub.
    """
    if args.dense is not None:
        # --revision is that of the pruned model.
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
