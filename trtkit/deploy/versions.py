"""Which versions of its models a server serves, and waiting until it has taken over a change. Standard library only.

Asks the repository index, which every server answers and which changes nothing (Triton's model repository extension of
the KServe v2 protocol).
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtkit.deploy import serverlog
from trtkit.deploy.command import POLL_SECONDS
from trtkit.deploy.deployment import Deployment
from trtkit.deploy.readiness import PROBE_TIMEOUT_S, connect_host
from trtkit.errors import CheckFailedError, InputError, LacksError

_GRACE_S = 3 * POLL_SECONDS
"""A version that is down for longer than some looks of the server is not merely yet to be tried again."""


class StillLoadingError(CheckFailedError):
    """Nothing is wrong so far: the server may yet take the version over."""


@dataclass(frozen=True)
class ModelVersion:
    """One version as a server knows it.

    Attributes:
        state: READY, LOADING, UNLOADING or UNAVAILABLE.
        reason: why it is not available; `unloaded` when nothing is wrong.
    """

    model: str
    version: int
    state: str
    reason: str = ""

    @property
    def broken(self) -> bool:
        return self.state == "UNAVAILABLE" and self.reason not in ("", "unloaded")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def versions_of(deployment: Deployment) -> list[ModelVersion]:
    """The versions that the server has or had a try at, by model and number; none when it does not answer.

    Those that are over, and gone from the repository, are left out.
    """
    connection = http.client.HTTPConnection(
        connect_host(deployment.host), deployment.http_port, timeout=PROBE_TIMEOUT_S
    )
    try:
        connection.request("POST", "/v2/repository/index", "{}", {"Connection": "close"})
        entries = json.loads(connection.getresponse().read())
        found = [
            ModelVersion(entry["name"], int(entry["version"]), entry.get("state", ""), _short(entry.get("reason", "")))
            for entry in entries
            if entry.get("version")
        ]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return []
    finally:
        connection.close()
    repository = Path(deployment.repository)
    kept = [one for one in found if one.state != "UNAVAILABLE" or (repository / one.model / str(one.version)).is_dir()]
    return sorted(kept, key=lambda one: (one.model, one.version))


def check_polls(deployment: Deployment, repository: Path) -> None:
    """Raises InputError unless the deployment serves this repository and takes over what changes there."""
    if Path(deployment.repository) != repository.expanduser().resolve():
        raise InputError(
            f"deployment '{deployment.name}' serves {deployment.repository}, not {repository}", "name that repository"
        )
    if deployment.model_control != "poll":
        raise InputError(
            f"deployment '{deployment.name}' does not look for changes (deploy.model_control is not 'poll')",
            f"set it in the build config, then `trtkit deploy down {deployment.name}` and up again",
        )


def log_end(deployment: Deployment) -> int:
    """Size of the server's log, for `wait_for_versions` to read on from; 0 without one."""
    try:
        return Path(deployment.log_path).stat().st_size
    except OSError:
        return 0


def wait_for_versions(
    deployment: Deployment,
    model: str,
    wanted: Sequence[int],
    *,
    timeout_s: float,
    log_from: int,
    alive: Callable[[], bool] = lambda: True,
) -> None:
    """Returns when the server serves the `wanted` versions of a model and no other.

    Args:
        timeout_s: how long they may load.
        log_from: `log_end` before the change.
        alive: whether the deployment still runs; asked now and then.

    Raises:
        CheckFailedError: a version does not load, with the server's words.
        StillLoadingError: it takes too long.
        LacksError: the deployment ended.
    """
    begun = time.monotonic()
    before = {one.version: one for one in versions_of(deployment) if one.model == model}
    loading: set[int] = set()
    while True:
        now = {one.version: one for one in versions_of(deployment) if one.model == model}
        ready = {number for number, one in now.items() if one.state == "READY"}
        if ready == set(wanted):
            return
        waited = time.monotonic() - begun
        loading |= {number for number, one in now.items() if one.state == "LOADING"}
        for number in wanted:
            one = now.get(number)
            is_news = number in loading or one != before.get(number) or waited > _GRACE_S
            if one is not None and one.broken and is_news:
                raise CheckFailedError(
                    f"version {number} of '{model}' does not load: {one.reason}{_serving(model, ready)}",
                    "mend it and add it again",
                )
        if reason := _poll_failure(deployment, model, log_from):
            raise CheckFailedError(
                f"deployment '{deployment.name}' cannot read '{model}': {reason}{_serving(model, ready)}",
                "see `trtkit repo lint`",
            )
        if not alive():
            raise LacksError(f"deployment '{deployment.name}' ended meanwhile", f"see {deployment.log_path}")
        if waited > timeout_s:
            states = ", ".join(f"{one.version} {one.state}" for one in now.values()) or "no answer"
            raise StillLoadingError(
                f"'{model}' does not serve version {', '.join(map(str, wanted))} after {timeout_s:g} s ({states})",
                "the change stays, and is served when it is loaded: see `trtkit deploy status`, or go back with "
                "`trtkit repo rollback`",
            )
        time.sleep(0.1)


def _serving(model: str, ready: set[int]) -> str:
    if not ready:
        return f"; no version of '{model}' serves"
    return f"; version {', '.join(map(str, sorted(ready)))} serves on"


def _poll_failure(deployment: Deployment, model: str, log_from: int) -> str:
    """Why the server could not read the model's config, which its index does not tell."""
    try:
        with Path(deployment.log_path).open("rb") as stream:
            stream.seek(log_from)
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    failed = re.search(rf"Poll failed for model directory '{re.escape(model)}': (.*?)\"?$", text, re.MULTILINE)
    if failed is None:
        return ""
    said = [line for line in serverlog.reasons(text) if "Poll failed" not in line]
    return " ".join([_short(failed[1]), *said[:1]])


def _short(reason: str) -> str:
    """The first line of a reason: the others are a traceback, which the log has."""
    lines = [line.strip() for line in reason.replace("\\n", "\n").splitlines() if line.strip()]
    return lines[0].removeprefix("Internal: ") if lines else ""
