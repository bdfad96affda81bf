"""`optimum-cli cap inspect`: what was pruned in a checkpoint, and how."""

import dataclasses
from typing import Any

from optimum_cap.commands.base import CAPSubcommand, add_general_flags, add_hub_flags
from optimum_cap.commands.parser import OUTPUT, CommandParser
from optimum_cap.commands.summary import sensitivity_table, sparsity_table, summary_rows
from optimum_cap.text import labelled, printable_values


class InspectCommand(CAPSubcommand):
    """Reads the pruning record; weights are read only to verify them."""

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "MODEL",
            "Show what was pruned in a checkpoint, how, and from which model. With --json, it "
            "prints the whole record.",
            "pruned",
            "you/model-cap --verify",
            page="checkpoint_format",
        )
        parser.add_model("folder or Hub id of a pruned checkpoint", "checkpoint")
        parser.group(OUTPUT)(
            "--verify",
            action="store_true",
            help="compare weights and settings with their SHA-256 in the record",
        )
        add_hub_flags(parser)
        add_general_flags(parser)

    def prepare(self) -> str:
        """Return the checkpoint; reading it is the only check."""
        return self.args.checkpoint

    def execute(self, prepared: str) -> dict[str, Any]:
        """Show the record."""
        from optimum_cap.checkpoint import PruningRecord, inspect_checkpoint

        args = self.args
        summary = inspect_checkpoint(
            prepared, revision=args.revision, token=args.token, verify=args.verify
        )
        unescaped = summary.record
        # The record is untrusted, and a terminal obeys control characters.
        record = PruningRecord.from_dict(printable_values(summary.record.to_dict()))
        summary = dataclasses.replace(summary, record=record)
        revision = f" at {record.base_revision}" if record.base_revision else ""
        rows = [("base model", f"{record.base_model or 'unknown'}{revision}")]
        rows += _settings_rows(record.config)
        rows += summary_rows(summary)
        if args.verify:
            rows.append(("verified", "weights, settings and record are as they were saved"))
        rows.append(("versions", ", ".join(f"{k} {v}" for k, v in record.versions.items())))
        self.answer(labelled(rows))
        if record.sensitivities:
            self.answer(f"\nsites, each pruned alone ({record.sensitivities_are})")
            self.answer(sensitivity_table(record.sensitivities))
        if not record.removed:
            self.answer(f"\n{sparsity_table(record.matrices)}")
        return {**summary.to_dict(), "verified": args.verify, "record": unescaped.to_dict()}


def _settings_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the recipe with everything it implies, and the settings that differ from it.

    Settings of a newer version are shown unchanged.
    """
    from optimum_cap.config import CAPConfig

    values = {name: value for name, value in values.items() if name != "quant_method"}
    try:
        config = CAPConfig.from_dict(values)
        plain = CAPConfig(sparsity=config.sparsity, pattern=config.pattern, recipe=config.recipe)
    except (ValueError, TypeError):
        return [("settings", ", ".join(f"{name} {value}" for name, value in values.items()))]
    method, of_recipe = (dataclasses.asdict(each.method) for each in (config, plain))
    implied = ", ".join(
        f"{name} {value}" + (f" (recipe: {of_recipe[name]})" if value != of_recipe[name] else "")
        for name, value in method.items()
    )
    defaults = plain.to_dict()
    changed = [
        f"{name} {value}"
        for name, value in config.to_dict().items()
        if name not in ("recipe", "sparsity", "pattern", *_DATA, *method)
        and value != defaults[name]
    ]
    data = ", ".join(f"{name} {values[name]}" for name in _DATA if name in config.fields_used)
    return [
        ("pruned to", f"{config.sparsity} of the weights, pattern {config.pattern}"),
        ("recipe", f"{config.recipe}: {implied}"),
        ("data", data or "none"),
        *([("not default", ", ".join(changed))] if changed else []),
    ]


_DATA = ("dataset", "num_samples", "seed")
