"""A Triton server for the length of a test, with options that `trtkit deploy` does not offer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trtkit.deploy import ports
from trtkit.deploy.command import server_arguments
from trtkit.deploy.server import environment, find_server, prepared


@dataclass
class Server:
    """A running server on ports of its own."""

    http_port: int
    grpc_port: int
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    def http(self, path: str, body: object = None, timeout: float = 60.0) -> tuple[int, str]:
        """Status and text of an HTTP request; a POST when there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http_port}/v2/{path}", data=data, headers={"Connection": "close"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@contextmanager
def serve(repository: Path, work: Path, *options: str) -> Iterator[Server]:
    """A Triton server for the block. `options` override those of trtkit."""
    found = prepared(find_server())
    http, grpc_, metrics = ports.choose("127.0.0.1", (0, 0, 0))
    log = work / "server.log"
    arguments = server_arguments(
        str(repository),
        host="127.0.0.1",
        http_port=http,
        grpc_port=grpc_,
        metrics_port=metrics,
        exit_timeout_s=3,
        shm_prefix=f"trtkit_repo_test_{os.getpid()}_{http}_",
        backend_directory=str(found.backends),
        cache_directory=str(found.caches),
    )
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(found.binary), *arguments, *options],
            env=environment(found, {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            server = Server(http, grpc_, log, process)
            for _ in range(600):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    if server.http("health/ready", timeout=5)[0] == 200:
                        break
                except OSError:
                    pass
                time.sleep(0.1)
            else:
                raise AssertionError(f"not ready in time: {log.read_text()[-3000:]}")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
