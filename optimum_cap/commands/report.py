"""`optimum-cli cap report`: a page about a checkpoint."""

from argparse import ArgumentParser
from pathlib import Path

from optimum_cap.commands.base import CAPSubcommand, add_common_flags, check_output_file


class ReportCommand(CAPSubcommand):
    """Reads the record and the results; the weights are not read."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags."""
        parser.description = (
            "Write a page about a pruned checkpoint: facts, results, pictures, settings and "
            "record. The file needs no other file and no network."
        )
        parser.add_argument("checkpoint", help="folder or Hub id of a pruned checkpoint")
        parser.add_argument(
            "-o",
            "--output",
            type=Path,
            default=Path("report.html"),
            metavar="FILE",
            help="HTML file to write (default: report.html)",
        )
        add_common_flags(parser)

    def prepare(self) -> None:
        """Check the output file."""
        if self.args.output.suffix not in (".html", ".htm"):
            raise ValueError(
                f"the output {self.args.output} must end in .html, so that browsers open it"
            )
        check_output_file(self.args.output)

    def execute(self, prepared: None) -> None:
        """Write the page."""
        from optimum_cap.publishing import write_html_report

        args = self.args
        write_html_report(args.checkpoint, args.output, revision=args.revision, token=args.token)
        print(f"saved: {args.output}")
