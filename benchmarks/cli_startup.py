"""Start-up time of the command line, beside `optimum-cli --help`.

    python benchmarks/cli_startup.py [runs]

Prints the median of several runs of the help of each command, and of the time until `cap prune`
says what it is about to do, before its imports. The commands alternate, so that a slow moment of
the machine hits all of them.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from optimum_cap.commands.cap import CAPCommand

OPTIMUM_CLI = str(Path(sys.executable).with_name("optimum-cli"))
MODEL = Path(__file__).parents[1] / "examples" / "tiny_reasoner" / "model"
HELP = {"--help": ["--help"], "cap --help": ["cap", "--help"]} | {
    f"cap {info.name} --help": ["cap", info.name, "--help"] for info in CAPCommand.SUBCOMMANDS
}
# Stopped after its first line, so that nothing is pruned.
FIRST_LINE = {
    "cap prune, first line": ["cap", "prune", str(MODEL), "-o", "unused", "--sparsity", "0.5"]
}


def seconds_to_first_line(arguments: list[str]) -> float:
    start = time.perf_counter()
    with subprocess.Popen(
        [OPTIMUM_CLI, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seconds = time.perf_counter() - start
        process.kill()
    return seconds


def seconds_to_end(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([OPTIMUM_CLI, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    times: dict[str, list[float]] = {name: [] for name in HELP | FIRST_LINE}
    for _ in range(runs):
        for name, arguments in HELP.items():
            times[name].append(seconds_to_end(arguments))
        for name, arguments in FIRST_LINE.items():
            times[name].append(seconds_to_first_line(arguments))
    reference = statistics.median(times["--help"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:25} {median:.3f} s, {median - reference:+.3f} s (median of {runs})")


if __name__ == "__main__":
    main()
