"""The exact k-th smallest importance against `torch.sort`: seconds and extra memory.

Each side runs in a process of its own, taking turns, so that its peak memory can be read.

    python benchmarks/threshold.py --millions 500
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from optimum_cap.methods import kth_smallest


def importances(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.empty(count).exponential_(generator=generator)


def by_histogram(values: torch.Tensor, k: int) -> float:
    return kth_smallest(lambda: (values,), k).value


def by_sorting(values: torch.Tensor, k: int) -> float:
    return float(values.sort().values[k - 1])


METHODS = {"histogram": by_histogram, "sort": by_sorting}


def measure(method: str, count: int) -> dict[str, float]:
    """Run one method once: seconds, extra peak memory in MB, and the value found."""
    values = importances(count)
    METHODS[method](values[:1000], 500)  # load what is loaded lazily
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    value = METHODS[method](values, count // 5)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "extra_mb": (peak - before) / 1000, "value": value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=100, help="millions of importances")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    count = arguments.millions * 1_000_000
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, count)))
        return

    results: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for _ in range(arguments.runs):
        for method, runs in results.items():
            command = [sys.executable, __file__, "--measure", method]
            command += ["--millions", str(arguments.millions)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(output))
    values = {run["value"] for runs in results.values() for run in runs}
    if len(values) != 1:
        raise SystemExit(f"the methods disagree: {values}")

    print(f"{arguments.millions} million importances, {torch.get_num_threads()} threads\n")
    print("| method | seconds, median (min to max) | extra memory, MB |\n|---|---|---|")
    for method, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        print(
            f"| {method} | {statistics.median(seconds):.2f} "
            f"({min(seconds):.2f} to {max(seconds):.2f}) | "
            f"{statistics.median(run['extra_mb'] for run in runs):.0f} |"
        )
    ratios = [
        slow["seconds"] / fast["seconds"]
        for slow, fast in zip(results["sort"], results["histogram"], strict=True)
    ]
    print(
        f"\nsort / histogram: {statistics.median(ratios):.1f} "
        f"({min(ratios):.1f} to {max(ratios):.1f})"
    )


if __name__ == "__main__":
    main()
