"""Writes the table of architectures in docs/models.md.

In the folder `tests`: `python -m helpers.architecture_table` tries every class and replaces the
table; with names of model types, it prints what it finds of these.
"""

import argparse
import datetime
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import transformers
from transformers.utils import logging

from helpers.architecture_checks import Support, support_in_process
from helpers.every_architecture import all_kinds
from helpers.paths import ROOT

PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
LARGE_SHARE = 0.1  # of the linear weights of a decoder
_SITES = {"attention": "heads", "mixer": "mixers", "mlp": "MLPs", "expert": "experts"}


def status_of(found: Support) -> str:
    """Return one of the titles of `table`."""
    if found.not_built:
        return "not tried"
    if found.problem:
        return "wrong"
    if found.refused:
        return "refused"
    return "in part" if found.part or found.dense[0] > LARGE_SHARE else "supported"


def reason_of(found: Support) -> str:
    """Return why a class is not supported, or not wholly."""
    share, names = found.dense
    dense = f"{share:.0%} of the linear weights stay dense ({', '.join(f'`{n}`' for n in names)})"
    return found.not_built or found.problem or found.refused or found.part or dense


def lines_of(found: Support) -> str:
    """Return the row of a class."""
    sites = ", ".join(text for kind, text in _SITES.items() if kind in found.sites)
    share, names = found.dense
    shown = sorted({name.rpartition(".")[2] for name in names})
    dense = f"{share:.1%}: {', '.join(f'`{name}`' for name in shown[:4])}" if names else ""
    dense += ", ..." if len(shown) > 4 else ""
    return f"| `{found.kind}` | {found.name} | {sites} | {found.scoring} | {dense} |"


def table(results: list[Support]) -> str:
    """Return everything between the markers of the page."""
    by_status: dict[str, list[Support]] = {}
    for found in results:
        by_status.setdefault(status_of(found), []).append(found)
    counts = {status: len(group) for status, group in by_status.items()}
    today = datetime.datetime.now(datetime.UTC).date()
    parts = [
        f"Tried on {today} with transformers {transformers.__version__} and torch "
        f"{torch.__version__.partition('+')[0]}, by number of classes: "
        f"{counts.get('supported', 0)} supported, {counts.get('in part', 0)} in part, "
        f"{counts.get('refused', 0)} refused, {counts.get('wrong', 0)} failing, and "
        f"{counts.get('not tried', 0)} of which no small model could be built.",
        "### Supported",
        "| model type | class | sites | causal scores by | left dense |\n|---|---|---|---|---|",
    ]
    parts[-1] += "".join(f"\n{lines_of(found)}" for found in by_status.get("supported", []))
    sections = {
        "in part": "### In part",
        "refused": "### Refused, with this sentence",
        "wrong": "### Failing",
        "not tried": "### Not tried: no small model of the class could be built",
    }
    for status, title in sections.items():
        if group := by_status.get(status):
            rows = "\n".join(f"- `{each.kind}`: {reason_of(each)}" for each in group)
            parts += [title, rows]
    return "\n\n".join(parts) + "\n"


def tried(kinds: list[str]) -> Iterator[Support]:
    """Yield what is found of each class; each is tried in a process of its own."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable_progress_bar()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(support_in_process, kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*", metavar="MODEL_TYPE", help="classes to try only")
    arguments = parser.parse_args()
    results = []
    for found in tried(arguments.kinds or all_kinds()):
        status = status_of(found)
        shown = found.sites if status == "supported" else reason_of(found)
        print(f"{status:10} {found.kind}: {shown}", flush=True)
        results.append(found)
    if not arguments.kinds:
        before, _, rest = PAGE.read_text().partition(START)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{START}\n{table(results)}\n{END}{after}")


if __name__ == "__main__":
    main()
