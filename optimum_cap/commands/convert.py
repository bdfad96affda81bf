"""`optimum-cli cap convert`: rewrite a checkpoint in another format."""

from pathlib import Path
from typing import Any

from optimum_cap.commands.base import (
    CAPSubcommand,
    add_general_flags,
    add_hub_flags,
    check_output_folder,
)
from optimum_cap.commands.parser import REQUIRED, CommandParser
from optimum_cap.text import format_size


class ConvertCommand(CAPSubcommand):
    """Converts between the formats packed, coded (compressed) and dense; values are unchanged."""

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "MODEL --format FORMAT -o DIR",
            "Rewrite a pruned checkpoint in another format.",
            "pruned --format dense -o pruned-dense",
            "you/model-cap --format coded -o smaller",
            page="serving",
        )
        parser.add_model("folder or Hub id of a pruned checkpoint", "checkpoint")
        add = parser.group(REQUIRED)
        add(
            "--format",
            required=True,
            metavar="FORMAT",
            help="packed, coded, or dense, which loads without this plugin (required)",
        )
        add("-o", "--output", required=True, type=Path, metavar="DIR", help="new folder to write")
        add_hub_flags(parser)
        add_general_flags(parser)

    def prepare(self) -> None:
        """Check the output folder and the name of the format."""
        check_output_folder(self.args.output, self.args.checkpoint)

        from optimum_cap.formats import FORMATS

        if self.args.format not in FORMATS:
            raise ValueError(
                f"--format must be one of {', '.join(FORMATS)}, got {self.args.format!r}"
            )

    def execute(self, prepared: None) -> dict[str, Any]:
        """Convert and print both sizes."""
        from optimum_cap.checkpoint import convert_checkpoint, inspect_checkpoint

        args = self.args
        source = inspect_checkpoint(args.checkpoint, revision=args.revision, token=args.token)
        target = convert_checkpoint(
            args.checkpoint, args.output, args.format, revision=args.revision, token=args.token
        )
        size = inspect_checkpoint(str(target)).weight_bytes
        self.say(
            f"{source.checkpoint_format} {format_size(source.weight_bytes)} -> "
            f"{args.format} {format_size(size)}: {target}"
        )
        return {"saved": str(target), "bytes_before": source.weight_bytes, "bytes_after": size}
