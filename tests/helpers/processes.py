"""Runs a script in several processes that work together."""

import os
import socket
import subprocess
import sys

from helpers.paths import TESTS


def ranks(*arguments: object, script: str, size: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Run a script in `size` ranks, without a launcher that ends the others when one dies.

    Args:
        arguments: Arguments of the script.
        script: Source of the script; `{tests}` stands for the path of the tests.
        size: Number of ranks.

    Returns:
        What each rank printed, by its own pipe: lines of two ranks cannot run into each other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", script.format(tests=str(TESTS))]
        processes.append(
            subprocess.Popen(
                [*command, *map(str, arguments)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    done = []
    for process in processes:
        out, err = process.communicate(timeout=280)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done
