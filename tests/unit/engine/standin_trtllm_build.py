"""A stand-in for trtllm-build, which needs a GPU: checks every argument against the real flags, writes likely output.

STANDIN_VERSION is the TensorRT-LLM version that it plays, STANDIN_FAILURE what goes wrong, STANDIN_PIDS a file that
receives the pids of a build that hangs, and STANDIN_SEEN a file that receives the arguments.
"""

# ruff: noqa: T201
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

VERSION = os.environ["STANDIN_VERSION"]
FAILURE = os.environ.get("STANDIN_FAILURE", "")


def usage(message: str) -> None:
    sys.exit(f"usage: trtllm-build [-h] ...\ntrtllm-build: error: {message}")


def parse(words: list[str]) -> dict[str, str]:
    table = json.loads((Path(__file__).parents[2] / "data" / "trtllm_build_flags.json").read_text())
    flags = table["0.17" if VERSION.startswith("0.") else "1.x"]["flags"]
    given: dict[str, str] = {}
    while words:
        name = words.pop(0)
        if name not in flags:
            usage(f"unrecognized arguments: {name}")
        if name in given:
            usage(f"{name} is given twice")
        flag = flags[name]
        if flag["kind"] != "value":
            usage(f"this stand-in knows no {flag['kind']} flags: {name}")
        if not words or words[0].startswith("--"):
            usage(f"argument {name}: expected one argument")
        given[name] = words.pop(0)
        if "choices" in flag and given[name] not in flag["choices"]:
            usage(f"argument {name}: invalid choice: '{given[name]}'")
        if flag["type"] == "int" and not given[name].isdecimal():
            usage(f"argument {name}: invalid int value: '{given[name]}'")
    return given


def hang() -> None:
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    Path(os.environ["STANDIN_PIDS"]).write_text(f"{os.getpid()} {worker.pid}")
    print("[TRT-LLM] [I] compiling", flush=True)
    time.sleep(120)


def fail(output: Path) -> None:
    """What goes wrong before the engine is written."""
    if FAILURE == "hang":
        (output / "rank0.engine").write_bytes(b"half")
        hang()
    if FAILURE == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAILURE == "oom":
        print("[TRT] [E] Requested amount of GPU memory (68719476736 bytes) could not be allocated.", flush=True)
        sys.exit("AssertionError: Engine building failed, please check error log.")
    if FAILURE == "tensors":
        print("Traceback (most recent call last):", flush=True)
        sys.exit("RuntimeError: Required but not provided tensors:{'transformer.layers.0.attention.qkv.weight'}")
    if FAILURE == "unknown":
        for number in range(1000):
            print(f"[TRT-LLM] [I] line {number}")
        sys.exit(7)


def main() -> None:
    given = parse(sys.argv[1:])
    banner = "9.9.9" if FAILURE == "version" else VERSION
    print(f"[TensorRT-LLM] TensorRT-LLM version: {banner}", flush=True)
    checkpoint, output = Path(given["--checkpoint_dir"]), Path(given["--output_dir"])
    config = json.loads((checkpoint / "config.json").read_text())
    world = config["mapping"]["tp_size"] * config["mapping"]["pp_size"]
    for rank in range(world):
        (checkpoint / f"rank{rank}.safetensors").read_bytes()
    if int(given["--workers"]) < 1 or not Path(given["--output_timing_cache"]).parent.is_dir():
        usage("no workers, or no folder for the timing cache")
    Path(os.environ["STANDIN_SEEN"]).write_text(json.dumps(sys.argv[1:]))
    fail(output)
    numbers = {name.removeprefix("--"): int(value) for name, value in given.items() if name.startswith("--max_")}
    if FAILURE == "mapping":
        config["mapping"] = {"world_size": 1, "tp_size": 1, "pp_size": 1}
    engine = {
        "version": VERSION,
        "pretrained_config": config,
        "build_config": {**numbers, "kv_cache_type": given["--kv_cache_type"].upper(), "plugin_config": {}},
    }
    (output / "config.json").write_text(json.dumps(engine))
    for rank in range(world - (FAILURE == "rank")):
        (output / f"rank{rank}.engine").write_bytes(b"engine of rank %d" % rank)
    Path(given["--output_timing_cache"]).write_bytes(b"timings")
    print("[TRT-LLM] [I] Total time of building all engines: 00:00:01", flush=True)


main()
