"""`optimum-cli cap study`: many models, recipes, sparsities and seeds, side by side."""

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_cap.commands.base import CAPSubcommand

if TYPE_CHECKING:
    from optimum_cap.study import Study


class StudyCommand(CAPSubcommand):
    """Checks the whole study first; then a cell that fails is a result, not the end."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the flags."""
        parser.description = (
            "Measure models x recipes x sparsities x calibration sets x seeds. Every cell is "
            "cached: run it again to resume, or after the file has grown."
        )
        add = parser.add_argument
        add("study", type=Path, metavar="STUDY.yaml", help="what to measure (docs/study.md)")
        add(
            "-o",
            "--output",
            type=Path,
            metavar="DIR",
            help="folder of cells, table and pictures (default: runs/ and the name of the file)",
        )
        add("--dry-run", action="store_true", help="check the file, print the cells, measure none")
        add("--debug", action="store_true", help="show tracebacks")

    def prepare(self) -> "Study":
        """Read the study, and check every cell of it."""
        from optimum_cap.study import Study

        return Study.load(self.args.study)

    def execute(self, prepared: "Study") -> None:
        """Measure what is missing; write table and pictures."""
        cells = list(prepared.cells())
        if self.args.dry_run:
            for cell in cells:
                print(cell)
            print(f"{len(cells)} cells")
            return
        from optimum_cap.report import write_report
        from optimum_cap.study import run_study

        folder = self.args.output or Path("runs") / self.args.study.stem
        rows = run_study(prepared, folder)
        print(f"saved: {folder / 'results.csv'}")
        for file in write_report(prepared, rows, folder):
            print(f"saved: {file}")
        if failed := len({tuple(row[axis] for axis in _AXES) for row in rows if row["error"]}):
            raise RuntimeError(f"{failed} of {len(cells)} cells failed; results.md names them")


_AXES = ("model", "recipe", "sparsity", "calibration", "seed")
