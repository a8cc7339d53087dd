"""What every peer's script shares: arguments, and the measuring of one process. Needs nothing but the standard library.

The scripts run in environments of their own, each as `python SCRIPT --model DIR --tokens FILE.npy --method M --out DIR
--report FILE.json`; one process does one job, so that memory and time belong to it alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MB = 1e6


def parse(description: str | None, methods: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the Hugging Face checkpoint")
    parser.add_argument("--tokens", type=Path, required=True, help="calibration: .npy, int64 (samples, length)")
    parser.add_argument("--method", choices=methods, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--group", type=int, default=128, help="inputs per scale of int4 weights")
    parser.add_argument("--batch", type=int, default=1, help="calibration windows in one forward pass")
    parser.add_argument("--dtype", default="float32", help="dtype the model is loaded in; auto is the checkpoint's own")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    return options


class Job:
    """Measures stages of this process. Make it after the imports, so that their time and memory do not count.

    The report holds, per stage, its CPU and wall seconds, and the peak of the resident memory since the job was made.
    """

    def __init__(self, options: argparse.Namespace, packages: Sequence[str]) -> None:
        self.options = options
        self.report: dict[str, Any] = {
            "method": options.method,
            "group": options.group,
            "dtype": options.dtype,
            "versions": {"python": platform.python_version()}
            | {package: importlib.metadata.version(package) for package in packages},
            "files": {},  # format -> folder
            "notes": [],
            "finished": False,
            "stages": {},
        }
        forget_peak()
        self.report["before_mb"] = memory("VmRSS")
        self._save()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.report["stages"][name] = {
            "cpu_s": time.process_time() - cpu,
            "wall_s": time.perf_counter() - wall,
            "rss_mb": memory("VmRSS"),
            "peak_mb": memory("VmHWM"),
        }
        self._save()

    def write_files(self, kind: str, write: Callable[[Path], Any]) -> None:
        """Has `write` make the folder of one file format; a tool that cannot is noted, not hidden."""
        folder = self.options.out / kind
        try:
            with self.stage(f"write {kind}"):
                write(folder)
        except Exception as error:
            self.report["notes"].append(f"writes no {kind}: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            self.report["files"][kind] = str(folder)

    def finish(self) -> None:
        stages = self.report["stages"].values()
        self.report["growth_mb"] = max(stage["peak_mb"] for stage in stages) - self.report["before_mb"]
        self.report["finished"] = True
        self._save()

    def _save(self) -> None:
        """After every stage, so that a job that is stopped tells how far it came."""
        self.options.report.write_text(json.dumps(self.report, indent=2) + "\n")


def memory(key: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{key}:")) * 1024 / MB


def forget_peak() -> None:
    """The kernel counts VmHWM from here on."""
    Path("/proc/self/clear_refs").write_text("5")
