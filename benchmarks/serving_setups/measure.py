"""Load on a running server, and the CPU time that each of its processes spends on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving_setups.setups import TOKENS, Setup

LOAD = Path(__file__).parent / "load.py"


def load(url: str, server_pid: int, setup: Setup, *, concurrency: int, seconds: float, streams: bool) -> dict[str, Any]:
    """Figures of one closed loop, with CPU microseconds per request and per token by process."""
    job = {"requests": setup.requests, "outputs": setup.outputs, "tokens": TOKENS}
    before = cpu_seconds(server_pid)
    done = subprocess.run(
        [sys.executable, str(LOAD), url, setup.model, str(concurrency), str(seconds), "stream" if streams else "unary"],
        input=json.dumps(job), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    after = cpu_seconds(server_pid)
    figures: dict[str, Any] = json.loads(done.stdout)
    if figures["problems"]:
        raise RuntimeError(f"{setup.model}: {figures['problems']}")
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    requests = figures["all_requests"]
    figures["cpu_us_per_request"] = {name: 1e6 * value / requests for name, value in spent.items()}
    figures["server_us_per_request"] = 1e6 * sum(spent.values()) / requests
    figures["server_us_per_token"] = figures["server_us_per_request"] / TOKENS
    figures["client_us_per_token"] = 1e6 * figures["client_cpu_s"] / requests / TOKENS
    figures["tokens_per_s"] = figures["tokens"] / figures["wall_s"]
    figures["requests_per_s"] = figures["requests"] / figures["wall_s"]
    figures["tokens_per_response"] = figures["tokens"] / max(figures["responses"], 1)
    return figures


def cpu_seconds(server_pid: int) -> dict[str, float]:
    """CPU time of the server (as `server`) and of the python models under their names."""
    server = psutil.Process(server_pid)
    spent: dict[str, float] = {}
    for process in [server, *server.children(recursive=True)]:
        times = process.cpu_times()
        name = "server" if process.pid == server_pid else _model(process.cmdline())
        spent[name] = spent.get(name, 0.0) + times.user + times.system
    return spent


def _model(command: list[str]) -> str:
    """The python backend's stub is started with the path of its model.py."""
    path = next((Path(word) for word in command if word.endswith(".py")), None)
    return path.parents[1].name if path else Path(command[0]).name
