"""A stand-in for the Docker command line: checks every word, keeps containers as files, serves probes for them.

STANDIN_DOCKER is a folder: `images` lists the images that are here, `registry` those that can be pulled, `calls` gets
one JSON line per call, `containers/<name>.json` is a container. STANDIN_FATE decides what containers do: `serve` on
the published HTTP port, `exit` with code 1 after a Triton error, `mute` runs without ever answering, `broken` is made
and cannot start. With a file `no-logs` the engine has no answer about logs.
"""

# ruff: noqa: T201
from __future__ import annotations

import csv
import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

HOME = Path(os.environ["STANDIN_DOCKER"])
FATE = os.environ.get("STANDIN_FATE", "serve")
NAME = r"[a-zA-Z0-9][a-zA-Z0-9_.-]+"
FLAGS = {"--rm", "--init", "--detach"}
VALUES = {
    "--name": NAME,
    "--label": r"trtkit\.(deployment|start)=[a-zA-Z0-9][a-zA-Z0-9_.-]*",
    "--stop-timeout": r"[1-9]\d*",
    "--gpus": r".+",
    "--shm-size": r"[1-9]\d*[mg]",
    "--ulimit": r"memlock=-1|stack=67108864",
    "--publish": r"(\d[\d.]*|\[[\da-f:]+\]):[1-9]\d*:800[012]",
    "--mount": r".+",
    "--env": r"[A-Z_]+|HF_HUB_CACHE=/hub|HF_HUB_OFFLINE=1",
    "--user": r"\d+:\d+",
}
REPEATED = {"--label", "--ulimit", "--publish", "--mount", "--env"}
IMAGE = r"[a-z0-9.-]+(/[a-z0-9._-]+)+:[A-Za-z0-9._-]+"
SERVER = """
import http.server, sys
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
if sys.argv[2] == "serve":
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ready).serve_forever()
import time
time.sleep(600)
"""


def refuse(message: str, status: int = 125) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)


def check_gpus(value: str) -> None:
    """As in docker's opts/gpus.go: the value is CSV, and unquoted `device=0,1` means something else."""
    fields = next(csv.reader([value]))
    if fields != ["all"] and not (len(fields) == 1 and re.fullmatch(r"device=[\w,-]+", fields[0])):
        refuse(f'invalid argument "{value}" for "--gpus" flag: cannot set both Count and DeviceIDs')


def check_mount(value: str) -> None:
    """As in docker's opts/mount.go; stricter, since everything that is mounted here must be read-only."""
    fields = next(csv.reader([value]))
    pairs = dict(field.split("=", 1) for field in fields if "=" in field)
    if pairs.keys() != {"type", "source", "target"} or pairs["type"] != "bind" or fields[-1] != "readonly":
        refuse(f'invalid argument "{value}" for "--mount" flag')
    if not pairs["target"].startswith("/") or not pairs["source"].startswith("/"):
        refuse(f"invalid mount: {value}: paths must be absolute")
    if not Path(pairs["source"]).is_dir():
        refuse(f'invalid mount config for type "bind": bind source path does not exist: {pairs["source"]}')


def published_port(value: str) -> str:
    """As in docker's go-connections/nat: an address is an IP address, never a name."""
    address, port, _ = value.rsplit(":", 2)
    try:
        ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        refuse(f'invalid argument "{value}" for "--publish" flag: invalid IP address: {address}')
    return port


def run(words: list[str]) -> None:
    options: dict[str, list[str]] = {}
    while words and words[0].startswith("-"):
        name = words.pop(0)
        if name in FLAGS:
            options[name] = []
            continue
        if name not in VALUES or not words:
            refuse(f"unknown flag: {name}")
        value = words.pop(0)
        if not re.fullmatch(VALUES[name], value) or (name in options and name not in REPEATED):
            refuse(f'invalid argument "{value}" for "{name}" flag')
        options.setdefault(name, []).append(value)
    if "--gpus" in options:
        check_gpus(options["--gpus"][0])
    for value in options["--mount"]:
        check_mount(value)
    image, command = words[0], words[1:]
    if not re.fullmatch(IMAGE, image) or image not in (HOME / "images").read_text().split():
        refuse(f"Unable to find image '{image}' locally")
    if command[0] not in ("tritonserver", "mpirun") or "--rm" in options or "--detach" not in options:
        refuse("stand-in: only detached servers")
    file = HOME / "containers" / f"{options['--name'][0]}.json"
    if file.exists():
        said = f'Conflict. The container name "/{file.stem}" is already in use by container "{file.stem}". You have to'
        refuse(f"docker: Error response from daemon: {said} remove (or rename) that container.")
    port, _, _ = [published_port(value) for value in sorted(options["--publish"], key=lambda text: text[-4:])]
    pid = 0
    if FATE in ("serve", "mute"):
        pid = subprocess.Popen(
            [sys.executable, "-c", SERVER, port, FATE],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ).pid
    log = "" if FATE != "exit" else "| m | 1 | UNAVAILABLE: Internal: the engine is of another version |\n"
    container = {
        "id": os.urandom(32).hex(),
        "labels": dict(label.split("=", 1) for label in options["--label"]),
        "pid": pid,
        "running": bool(pid),
        "code": 0 if pid else 1,
        "log": "server says hello\n" + log,
    }
    file.write_text(json.dumps(container))
    if FATE == "broken":
        refuse("docker: Error response from daemon: could not select device driver with capabilities: [[gpu]]")
    print(container["id"])


def load(name: str) -> tuple[Path, dict[str, object]]:
    """A container by its name or its id."""
    for file in (HOME / "containers").iterdir():
        container: dict[str, object] = json.loads(file.read_text())
        if name in (file.stem, container["id"]):
            return file, container
    refuse(f"Error response from daemon: No such container: {name}", 1)
    raise AssertionError


def end(file: Path, container: dict[str, object]) -> None:
    if container["pid"] and container["running"]:  # pid 0 would be whoever runs the tests
        os.kill(int(str(container["pid"])), signal.SIGKILL)
    file.write_text(json.dumps(container | {"running": False}))


def main() -> None:
    words = sys.argv[1:]
    with (HOME / "calls").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    if (HOME / "dead").exists():
        refuse("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?", 1)
    match words:
        case ["run", *rest]:
            run(rest)
        case ["image", "inspect", image]:
            if image not in (HOME / "images").read_text().split():
                refuse(f"Error response from daemon: No such image: {image}", 1)
        case ["pull", image]:
            if image not in (HOME / "registry").read_text().split():
                refuse(f"Error response from daemon: manifest for {image} not found", 1)
            (HOME / "images").write_text((HOME / "images").read_text() + f"\n{image}")
        case [
            "inspect", "--type", "container", "--format",
            "[{{json .Id}},{{json .State}},{{json .Config.Labels}}]", name,
        ]:  # fmt: skip
            _, container = load(name)
            of = {"Running": container["running"], "ExitCode": container["code"]}
            print(json.dumps([container["id"], of, container["labels"]]))
        case ["stop", "-t", seconds, name] if seconds.isdigit():
            end(*load(name))
        case ["rm", "--force", name]:
            file, container = load(name)
            end(file, container)
            file.unlink()
        case ["logs", *_] if (HOME / "no-logs").exists():
            refuse("Error response from daemon: configured logging driver does not support reading", 1)
        case ["logs", name] | ["logs", "--tail", _, name]:
            print(load(name)[1]["log"], end="")
        case _:
            refuse(f"stand-in: unknown call: docker {' '.join(words)}")


if __name__ == "__main__":
    main()
