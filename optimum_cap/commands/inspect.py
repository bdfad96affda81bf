"""`optimum-cli cap inspect`: what was pruned in a checkpoint and how."""

import dataclasses
import json
from argparse import ArgumentParser
from typing import Any

from optimum_cap.commands.base import CAPSubcommand, add_common_flags
from optimum_cap.commands.summary import print_summary, sensitivity_table, sparsity_table
from optimum_cap.text import printable_values


class InspectCommand(CAPSubcommand):
    """Reads the pruning record; the weights only to verify them."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags."""
        parser.description = "Show what was pruned in a checkpoint, how, and from which model."
        parser.add_argument("checkpoint", help="folder or Hub id of a pruned checkpoint")
        parser.add_argument("--json", action="store_true", help="print the whole record as JSON")
        parser.add_argument(
            "--verify",
            action="store_true",
            help="compare weights and settings with their SHA-256 in the record",
        )
        add_common_flags(parser)

    def prepare(self) -> str:
        """Return the checkpoint; reading it is the only check."""
        return self.args.checkpoint

    def execute(self, prepared: str) -> None:
        """Print the record."""
        from optimum_cap.checkpoint import PruningRecord, inspect_checkpoint

        args = self.args
        summary = inspect_checkpoint(
            prepared, revision=args.revision, token=args.token, verify=args.verify
        )
        unescaped = summary.record
        # The record may come from anywhere, and a terminal obeys control characters.
        record = PruningRecord.from_dict(printable_values(summary.record.to_dict()))
        summary = dataclasses.replace(summary, record=record)
        if args.json:
            values: dict[str, Any] = {
                "checkpoint_format": summary.checkpoint_format,
                "format_version": summary.format_version,
                "weight_bytes": summary.weight_bytes,
                "dense_bytes": summary.dense_bytes,
                "sparsity": record.sparsity,
                "zeros": record.zeros,
                "total": record.total,
                "verified": args.verify,
                "record": unescaped.to_dict(),
            }
            print(json.dumps(values, indent=2))
            return
        revision = f" at {record.base_revision}" if record.base_revision else ""
        print(f"base model    {record.base_model or 'unknown'}{revision}")
        config = {name: value for name, value in record.config.items() if name != "quant_method"}
        print(f"config        {', '.join(f'{name}={value}' for name, value in config.items())}")
        print_summary(summary)
        if args.verify:
            print("verified      weights, settings and record are as they were saved")
        print(f"versions      {', '.join(f'{k} {v}' for k, v in record.versions.items())}")
        if record.sensitivities:
            print(f"\nsites, each pruned alone ({record.sensitivities_are})")
            print(sensitivity_table(record.sensitivities))
        if not record.removed:
            print(f"\n{sparsity_table(record.matrices)}")
