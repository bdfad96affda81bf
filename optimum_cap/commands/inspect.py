"""`optimum-cli cap inspect`: what was pruned in a checkpoint and how."""

import json
from argparse import ArgumentParser
from typing import Any

from optimum_cap.commands.base import CAPSubcommand, add_common_flags
from optimum_cap.commands.summary import print_summary, sensitivity_table, sparsity_table


class InspectCommand(CAPSubcommand):
    """Reads the pruning record, without loading the weights."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags."""
        parser.description = "Show what was pruned in a checkpoint, how, and from which model."
        parser.add_argument("checkpoint", help="folder or Hub id of a pruned checkpoint")
        parser.add_argument("--json", action="store_true", help="print the whole record as JSON")
        add_common_flags(parser)

    def prepare(self) -> str:
        """Return the checkpoint; reading it is the only check."""
        return self.args.checkpoint

    def execute(self, prepared: str) -> None:
        """Print the record."""
        from optimum_cap.checkpoint import inspect_checkpoint

        summary = inspect_checkpoint(prepared, revision=self.args.revision, token=self.args.token)
        record = summary.record
        if self.args.json:
            values: dict[str, Any] = {
                "checkpoint_format": summary.checkpoint_format,
                "format_version": summary.format_version,
                "weight_bytes": summary.weight_bytes,
                "dense_bytes": summary.dense_bytes,
                "sparsity": record.sparsity,
                "zeros": record.zeros,
                "total": record.total,
                "record": record.to_dict(),
            }
            print(json.dumps(values, indent=2))
            return
        revision = f" at {record.base_revision}" if record.base_revision else ""
        print(f"base model    {record.base_model or 'unknown'}{revision}")
        config = {name: value for name, value in record.config.items() if name != "quant_method"}
        print(f"config        {', '.join(f'{name}={value}' for name, value in config.items())}")
        print_summary(summary)
        print(f"versions      {', '.join(f'{k} {v}' for k, v in record.versions.items())}")
        if record.sensitivities:
            print(f"\nsites, each pruned alone ({record.sensitivities_are})")
            print(sensitivity_table(record.sensitivities))
        print(f"\n{sparsity_table(record.matrices)}")
