"""CPU time of `trtkit --help`, against an empty Python and against importing what it must not import.

    python benchmarks/cli_startup.py

CPU time (user and system, of the child alone) instead of wall time, so that a busy machine changes little; the median
of several runs, the kinds in turn.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

GOAL_MS = 150
RUNS = 15

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "trtkit --help": ["-m", "trtkit", "--help"],
    "import pydantic, yaml, rich": ["-c", "import pydantic, yaml, rich.table"],
    "import transformers": ["-c", "import transformers.models.llama"],
}


def cpu_ms(arguments: list[str]) -> float:
    """User plus system time of one child process, in milliseconds."""
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{arguments} ended with {child.returncode}")
    return 1000 * (usage.ru_utime + usage.ru_stime)


def main() -> None:
    samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, arguments in COMMANDS.items():
            samples[name].append(cpu_ms(arguments))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    for name, median in medians.items():
        print(f"{name:30} {median:7.0f} ms  (min {min(samples[name]):.0f}, max {max(samples[name]):.0f}, n = {RUNS})")
    help_ms = medians["trtkit --help"]
    print(f"\ntrtkit --help / limit of {GOAL_MS} ms: {help_ms / GOAL_MS:.2f}")
    print(f"trtkit --help / empty Python:       {help_ms / medians['python -c pass']:.2f}")


if __name__ == "__main__":
    main()
