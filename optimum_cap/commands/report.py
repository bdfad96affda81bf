"""`optimum-cli cap report`: a page about a checkpoint."""

from pathlib import Path
from typing import Any

from optimum_cap.commands.base import (
    CAPSubcommand,
    add_general_flags,
    add_hub_flags,
    check_output_file,
)
from optimum_cap.commands.parser import OUTPUT, CommandParser


class ReportCommand(CAPSubcommand):
    """Reads the record and the results; the weights are not read."""

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "MODEL",
            "Write a page about a pruned checkpoint: facts, results, pictures, settings and "
            "record. The file needs no other file and no network.",
            "pruned -o report.html",
            page="sharing",
        )
        parser.add_model("folder or Hub id of a pruned checkpoint", "checkpoint")
        parser.group(OUTPUT)(
            "-o",
            "--output",
            type=Path,
            default=Path("report.html"),
            metavar="FILE",
            help="HTML file to write (default: report.html)",
        )
        add_hub_flags(parser)
        add_general_flags(parser)

    def prepare(self) -> None:
        """Check the output file."""
        if self.args.output.suffix not in (".html", ".htm"):
            raise ValueError(
                f"the output {self.args.output} must end in .html, so that browsers open it"
            )
        check_output_file(self.args.output)

    def execute(self, prepared: None) -> dict[str, Any]:
        """Write the page."""
        from optimum_cap.publishing import write_html_report

        args = self.args
        write_html_report(args.checkpoint, args.output, revision=args.revision, token=args.token)
        self.say(f"saved         {args.output}")
        return {"saved": str(args.output)}
