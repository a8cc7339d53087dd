"""A stand-in for tritonserver: checks every argument, listens on the three ports and answers probes as ready.

A model folder with a file `refuse` makes it fail like a model that does not load; one named `deaf` makes it ignore
SIGTERM; one named `loading` keeps it from ever opening its ports.
"""

# ruff: noqa: T201
from __future__ import annotations

import http.server
import re
import signal
import socket
import sys
import time
from pathlib import Path

VALUES = {
    "--model-repository": r"/.+",
    "--model-control-mode": r"none",
    "--exit-on-error": r"true",
    "--strict-readiness": r"true",
    "--exit-timeout-secs": r"[1-9]\d*",
    "--http-address": r"127\.0\.0\.1",
    "--http-port": r"[1-9]\d*",
    "--grpc-address": r"127\.0\.0\.1",
    "--grpc-port": r"[1-9]\d*",
    "--metrics-address": r"127\.0\.0\.1",
    "--metrics-port": r"[1-9]\d*",
    "--allow-sagemaker": r"false",
    "--allow-vertex-ai": r"false",
    "--backend-config": r"python,shm-region-prefix-name=trtkit_[0-9a-f]{16}_",
    "--log-verbose": r"0",
}
FLAGS = {"--disable-auto-complete-config"}


def parse(words: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name in options:
            sys.exit(f"stand-in: {name} is given twice")
        if name in FLAGS and not value:
            options[name] = ""
        elif name in VALUES and re.fullmatch(VALUES[name], value):
            options[name] = value
        else:
            sys.exit(f"stand-in: unrecognized option or value: {word}")
    if missing := (VALUES.keys() | FLAGS) - options.keys():
        sys.exit(f"stand-in: missing options: {sorted(missing)}")
    return options


class Probe(http.server.BaseHTTPRequestHandler):
    models: frozenset[str]

    def do_GET(self) -> None:
        known = {"/v2/health/ready"} | {f"/v2/models/{model}/ready" for model in self.models}
        if self.headers.get("Connection") != "close":
            sys.exit("stand-in: a probe would leave its connection open")
        self.send_response(200 if self.path in known else 400)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    options = parse(sys.argv[1:])
    repository = Path(options["--model-repository"])
    Probe.models = frozenset(entry.name for entry in repository.iterdir() if entry.is_dir())
    for model in sorted(Probe.models):
        print(f'I1121 03:10:30.000000 1 model_lifecycle.cc:472] "loading: {model}:1"', flush=True)
        if (repository / model / "refuse").exists():
            reason = "ValueError: refused on demand"
            print(f"E1121 03:10:30.000001 1 model_lifecycle.cc:642] \"failed to load '{model}' version 1: {reason}\"")
            print(f"| {model} | 1 | UNAVAILABLE: Internal: {reason} |\nerror: creating server: Internal", flush=True)
            sys.exit(1)
        while (repository / model / "loading").exists():
            time.sleep(0.05)
        if (repository / model / "deaf").exists():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"I1121 03:10:30.000002 1 model_lifecycle.cc:839] \"successfully loaded '{model}'\"", flush=True)
    listeners = [socket.create_server(("127.0.0.1", int(options[f"--{kind}-port"]))) for kind in ("grpc", "metrics")]
    server = http.server.HTTPServer(("127.0.0.1", int(options["--http-port"])), Probe)
    with listeners[0], listeners[1], server:
        server.serve_forever()


if __name__ == "__main__":
    main()
