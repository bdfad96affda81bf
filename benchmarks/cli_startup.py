"""Start-up time of the command line: `optimum-cli cap --help` beside `optimum-cli --help`.

    python benchmarks/cli_startup.py [runs]

Prints the median of several runs of each. The two alternate, so that a slow moment of the machine
hits both.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

OPTIMUM_CLI = str(Path(sys.executable).with_name("optimum-cli"))
COMMANDS = {
    "optimum-cli --help": [OPTIMUM_CLI, "--help"],
    "optimum-cli cap --help": [OPTIMUM_CLI, "cap", "--help"],
    "optimum-cli cap prune --help": [OPTIMUM_CLI, "cap", "prune", "--help"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    for name, values in times.items():
        print(f"{name:30} {statistics.median(values):.3f} s (median of {runs})")


if __name__ == "__main__":
    main()
