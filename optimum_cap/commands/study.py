"""`optimum-cli cap study`: compare recipes over models, sparsities, data sets and seeds."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_cap.commands.base import CAPSubcommand, add_general_flags
from optimum_cap.commands.parser import OUTPUT, REQUIRED, RUN, CommandParser

if TYPE_CHECKING:
    from optimum_cap.study import Study


class StudyCommand(CAPSubcommand):
    """Checks the whole study first; cells that fail later are recorded, and the study continues."""

    KEEPS_RESULTS = True

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "STUDY.yaml",
            "Measure models x recipes x sparsities x calibration sets x seeds. Every cell is "
            "cached: run the command again to resume, or after adding to the file.",
            "examples/studies/small_models.yaml --dry-run",
            "study.yaml -o runs/study --jobs 2",
            page="study",
        )
        parser.group(REQUIRED)(
            "study", type=Path, metavar="STUDY.yaml", help="what to measure (docs/study.md)"
        )
        parser.group(OUTPUT)(
            "-o",
            "--output",
            type=Path,
            metavar="DIR",
            help="folder for cells, table and plots (default: runs/ and the name of the file)",
        )
        add = parser.group("instead of what is in the file")
        add(
            "--models",
            nargs="+",
            metavar="LABEL=NAME",
            help="models to measure, instead of those in the file (default: those in the file)",
        )
        add(
            "--data-dir",
            metavar="DIR",
            help="folder of evaluation data and calibration presets (default: the file's data_dir)",
        )
        add(
            "--limit",
            type=int,
            metavar="N",
            help="questions, documents or windows per task (default: the file's limit)",
        )
        add = parser.group(RUN)
        add(
            "--jobs",
            type=int,
            default=1,
            metavar="N",
            help="cells to measure in parallel, each with its share of the cores (default: 1)",
        )
        add("--dry-run", action="store_true", help="check the file and print the cells, then stop")
        add_general_flags(parser)

    def prepare(self) -> "Study":
        """Read the study and check each of its cells."""
        from optimum_cap.study import Study

        if self.args.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {self.args.jobs}")
        changes = {
            "models": labelled_models(self.args.models or []),
            "data_dir": self.args.data_dir,
            "limit": self.args.limit,
        }
        changes = {key: value for key, value in changes.items() if value not in (None, {})}
        return Study.load(self.args.study, **changes)

    def execute(self, prepared: "Study") -> dict[str, Any]:
        """Measure the missing cells; write the table and the plots, and show the table."""
        cells = list(prepared.cells())
        if self.args.dry_run:
            self.answer("\n".join([*map(str, cells), f"{len(cells)} cells"]))
            return {"cells": list(map(str, cells))}
        from optimum_cap.study import run_study, write_report

        folder = self.args.output or Path("runs") / self.args.study.stem
        rows = run_study(prepared, folder, self.args.jobs)
        files = [folder / "results.csv", *write_report(prepared, rows, folder)]
        self.say((folder / "results.md").read_text(encoding="utf-8"))
        for file in files:
            self.say(f"saved         {file}")
        if failed := len({tuple(row[axis] for axis in _AXES) for row in rows if row["error"]}):
            raise RuntimeError(
                f"{failed} of {len(cells)} cells failed: see {folder / 'results.md'}"
            )
        return {"saved": str(folder), "files": list(map(str, files)), "rows": rows}


def labelled_models(labelled: list[str]) -> dict[str, str]:
    """Parse the arguments of `--models` into label -> name."""
    pairs = [text.partition("=") for text in labelled]
    for text, (label, equals, name) in zip(labelled, pairs, strict=True):
        if not (label and equals and name):
            raise ValueError(f"--models takes LABEL=NAME, e.g. small=./small-model, got {text!r}")
    models = {label: name for label, _, name in pairs}
    if len(models) < len(pairs):
        raise ValueError(f"--models uses a label twice: {' '.join(labelled)}")
    return models


_AXES = ("model", "recipe", "sparsity", "calibration", "seed")
