"""A stand-in for the Docker command line: checks every word of `run` and `kill`, runs the program without container.

Like a real container, what it runs survives the death of `docker run`: only `docker kill` ends it.
STANDIN_CONTAINERS is a folder with one file per running container, STANDIN_IMAGES the images that can be pulled.
"""

# ruff: noqa: T201
from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

CONTAINERS = Path(os.environ["STANDIN_CONTAINERS"])
NAME = r"[a-zA-Z0-9][a-zA-Z0-9_.-]+"
VALUES = {
    "--name": NAME,
    "--shm-size": r"\d+[bkmg]",
    "--ulimit": r"(memlock|stack)=-?\d+",
    "--user": r"\d+:\d+",
    "--env": r"[A-Z_]+=.*",
    "--workdir": r"/.*",
}
REPEATABLE = {"--env", "--ulimit", "--mount"}


def refuse(message: str, status: int = 125) -> None:
    print(f"docker: {message}", file=sys.stderr)
    sys.exit(status)


def check_gpus(value: str) -> None:
    """As in docker's opts/gpus.go: the value is CSV, and unquoted `device=0,1` means something else."""
    fields = next(csv.reader([value]))
    if fields != ["all"] and not (len(fields) == 1 and re.fullmatch(r"device=[\w,-]+", fields[0])):
        refuse(f'invalid argument "{value}" for "--gpus" flag: cannot set both Count and DeviceIDs')


def parse_mount(value: str) -> tuple[str, str, bool]:
    """(target, source, read only) as in docker's opts/mount.go."""
    fields = next(csv.reader([value]))
    pairs = dict(field.split("=", 1) for field in fields if "=" in field)
    flags = [field for field in fields if "=" not in field]
    if pairs.keys() != {"type", "source", "target"} or pairs["type"] != "bind" or flags not in ([], ["readonly"]):
        refuse(f"invalid --mount {value}")
    if not Path(pairs["source"]).is_absolute() or not Path(pairs["source"]).is_dir():
        refuse(f"bind source path does not exist: {pairs['source']}")
    return pairs["target"], pairs["source"], bool(flags)


def parse_run(words: list[str]) -> tuple[dict[str, list[str]], str, list[str]]:
    options: dict[str, list[str]] = {}
    while words and words[0].startswith("-"):
        name = words.pop(0)
        if name in ("--rm", "--init"):
            options[name] = []
            continue
        if name not in VALUES and name not in ("--gpus", "--mount"):
            refuse(f"unknown flag: {name}")
        if name in options and name not in REPEATABLE:
            refuse(f"{name} is given twice")
        value = words.pop(0)
        if name in VALUES and not re.fullmatch(VALUES[name], value):
            refuse(f"invalid argument {value!r} for {name!r} flag")
        options.setdefault(name, []).append(value)
    return options, words[0], words[1:]


def run(words: list[str]) -> None:
    options, image, command = parse_run(words)
    missing = {"--rm", "--name", "--gpus", "--shm-size", "--mount"} - options.keys()
    if missing:
        refuse(f"this stand-in wants {missing}")
    check_gpus(options["--gpus"][0])
    if image not in os.environ["STANDIN_IMAGES"].split():
        refuse(f"Error response from daemon: manifest for {image} not found: manifest unknown")
    mounts = [parse_mount(value) for value in options["--mount"]]
    if {target: read_only for target, _, read_only in mounts} != {"/checkpoint": True, "/engine": False}:
        refuse(f"mounts: {mounts}")
    record = CONTAINERS / options["--name"][0]
    if record.exists():
        refuse(f"Conflict. The container name {record.name} is already in use")
    for target, source, _ in mounts:
        command = [re.sub(rf"^{target}(?=/|$)", source, word) for word in command]
    environment = {key: value for key, value in os.environ.items() if key.startswith("STANDIN_") or key == "PATH"}
    environment |= dict(value.split("=", 1) for value in options.get("--env", []))
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    record.write_text(str(process.pid))
    status = process.wait()
    record.unlink(missing_ok=True)
    sys.exit(status if status >= 0 else 128 - status)


def kill(words: list[str]) -> None:
    record = CONTAINERS / words[0]
    if len(words) != 1 or not record.exists():
        refuse(f"Error response from daemon: No such container: {words}", 1)
    os.killpg(int(record.read_text()), signal.SIGKILL)
    record.unlink(missing_ok=True)


if os.environ.get("STANDIN_FAILURE") == "daemon":
    refuse("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?")
{"run": run, "kill": kill}[sys.argv[1]](sys.argv[2:])
