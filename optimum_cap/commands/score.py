"""`optimum-cli cap score`: measure the causal scores of a model and save them to a file."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from optimum_cap.commands.summary import scored_row
from optimum_cap.text import aligned, format_duration, labelled

if TYPE_CHECKING:
    from optimum_cap.scoring import CausalScores

_FIELDS = (
    "answers",
    "temperature",
    "top_p",
    "max_new_tokens",
    "answer_attempts",
    "answer_selection",
    "answer_candidates",
    "num_samples",
    "subsets",
    "aggregation",
    "scored_tokens",
    "scored_units",
    "mlp_unit_size",
    "estimator",
    "exact_examples",
    "precision",
    "max_length",
    "memory_budget",
    "torch_compile",
    "resume_dir",
    "seed",
)


_ROWS = 20_000  # most rows to print: enough for the heads of any model, not for single channels


class ScoreCommand(CAPSubcommand):
    """Writes a file that `cap prune --scores` reads at any sparsity, subsets and aggregation."""

    KEEPS_RESULTS = True

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "MODEL -o FILE",
            "Measure the causal scores of a model and save them.",
            "org/model -o scores.safetensors --dataset gsm8k",
            page="scoring",
        )
        parser.add_model("Hub id or folder of the model to score")
        parser.group(REQUIRED)(
            "-o", "--output", required=True, type=Path, metavar="FILE", help="file to write"
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
        return opening_lines(self.args, "scoring", "causal scores")

    def prepare(self) -> Prepared:
        """Check output, configuration, tokenizer and data."""
        args = self.args
        check_output_file(args.output)
        if args.output.exists() and not args.overwrite:
            raise ValueError(f"the output {args.output} exists: pass --overwrite to replace it")

        from optimum_cap.config import CAPConfig, effective
        from optimum_cap.runtime import ProcessGroup, default_folder

        process_group = ProcessGroup.current()
        process_group.silence_other_ranks()
        check_loading_flags(args, process_group.size)
        # CAPConfig requires a sparsity, on which scores do not depend; recipe "paper" uses scores.
        fields = {"sparsity": 0.5, "recipe": "paper", **config_values(vars(args))}
        config = CAPConfig(**effective({"resume_dir": default_folder()}, fields))
        check_resume_folder(fields.get("resume_dir"))
        check_prunable(args.model, args, may_be_pruned=True)
        check_has_lm_head(args.model, args)
        tokenizer = load_tokenizer(args)
        calibration_examples(config, tokenizer, args)
        process_group.all_gather(None)  # no process may write before all have checked the output
        return Prepared(config, tokenizer, process_group)

    def execute(self, prepared: Prepared) -> dict[str, Any] | None:
        """Measure and save the scores, and print them."""
        from optimum_cap.models import load_model
        from optimum_cap.pruner import CAPPruner
        from optimum_cap.scoring import causal_scores

        args, config = self.args, prepared.config
        start = time.monotonic()
        options = loading_options(args, prepared.process_group)
        model = load_model(args.model, **options)
        # Every process has all losses; rank 0 saves them.
        target = None if prepared.process_group.rank else args.output
        losses = CAPPruner(config).measure(model, prepared.tokenizer, save_to=target)
        prepared.process_group.shutdown()
        if prepared.process_group.rank:
            return None
        scores = causal_scores(losses, config.subsets, config.aggregation)
        seconds = time.monotonic() - start
        rows = [
            scored_row([(site.kind, site.layer) for site, _ in scores.units]),
            ("estimator", config.estimator),
            ("intact loss", f"{scores.intact_loss:.4f} nats per token"),
            ("time", format_duration(seconds)),
            ("saved", str(args.output)),
        ]
        self.say(labelled(rows))
        self.say(f"\n{score_table(scores)}")
        return {
            "saved": str(args.output),
            "seconds": seconds,
            "estimator": config.estimator,
            "intact_loss": scores.intact_loss,
            "units": len(scores.units),
        }


def score_table(scores: "CausalScores") -> str:
    """Return a table of units, scores and standard errors, ordered by descending score."""
    from optimum_cap.checkpoint import unit_label

    heads_only = all(site.kind == "attention" for site, _ in scores.units)
    rows = [["layer.head" if heads_only else "layer.unit", "score", "standard error"]]
    order = scores.scores.nan_to_num(float("inf")).argsort(descending=True, stable=True)
    for index in order[:_ROWS]:
        site, unit = scores.units[index]
        score, error = scores.scores[index], scores.standard_errors[index]
        label = unit_label(site.kind, site.layer, site.name, unit.index)
        rows.append([label, f"{score:+.6f}", f"{error:.6f}"])
    lines = [aligned(rows)]
    if (left := len(order) - _ROWS) > 0:
        lines.append(f"and {left:,} more with lower scores")
    return "\n".join(lines)
