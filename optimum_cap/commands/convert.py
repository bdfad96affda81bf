"""`optimum-cli cap convert`: rewrite a checkpoint in another format."""

from argparse import ArgumentParser
from pathlib import Path

from optimum_cap.commands.base import CAPSubcommand, add_common_flags, check_output_folder
from optimum_cap.text import format_size


class ConvertCommand(CAPSubcommand):
    """Converts between the formats packed, coded (compressed) and dense; values are unchanged."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags."""
        parser.description = "Rewrite a pruned checkpoint in another format."
        parser.add_argument("checkpoint", help="folder or Hub id of a pruned checkpoint")
        parser.add_argument(
            "--format",
            required=True,
            metavar="FORMAT",
            help="packed, coded, or dense, which loads without this plugin (required)",
        )
        parser.add_argument(
            "-o", "--output", required=True, type=Path, metavar="DIR", help="new folder to write"
        )
        add_common_flags(parser)

    def prepare(self) -> None:
        """Check the output folder and the name of the format."""
        check_output_folder(self.args.output, self.args.checkpoint)

        from optimum_cap.formats import FORMATS

        if self.args.format not in FORMATS:
            raise ValueError(
                f"--format must be one of {', '.join(FORMATS)}, got {self.args.format!r}"
            )

    def execute(self, prepared: None) -> None:
        """Convert and print both sizes."""
        from optimum_cap.checkpoint import convert_checkpoint, inspect_checkpoint

        args = self.args
        source = inspect_checkpoint(args.checkpoint, revision=args.revision, token=args.token)
        target = convert_checkpoint(
            args.checkpoint, args.output, args.format, revision=args.revision, token=args.token
        )
        size = inspect_checkpoint(str(target)).weight_bytes
        print(
            f"{source.checkpoint_format} {format_size(source.weight_bytes)} -> "
            f"{args.format} {format_size(size)}: {target}"
        )
