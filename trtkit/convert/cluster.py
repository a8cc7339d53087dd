"""Spreads the ranks of a conversion over the nodes of a Ray cluster that share a filesystem.

A task opens the source itself, plans again from config.json, and writes its ranks into a folder of its own. Only the
driver moves finished files to where they belong and notes them. So whatever a dying, cancelled or forgotten task still
does, it never touches a file of the checkpoint, and every attempt begins from scratch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import math
import os
import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtkit import __version__
from trtkit.checkpoint import rank_file
from trtkit.convert.conversion import Options, WriteRanks
from trtkit.convert.plan import Plan, plan_checkpoint
from trtkit.convert.progress import Progress
from trtkit.convert.source import source_tensors
from trtkit.convert.stream import Written, write_ranks
from trtkit.errors import InputError, LacksError, TrtkitError, missing_extra
from trtkit.hf import Source, open_source
from trtkit.safetensors_io import header_bytes

ATTEMPTS = 2
"""How often the ranks of a worker that dies are begun."""
SAMPLES = 32
"""Pieces of each source file that tell it from another with the same header."""
SAMPLE_BYTES = 4096
CONNECT_SECONDS = 5.0
CANCEL_SECONDS = 10.0

OnWritten = Callable[[list[int], str], None]

_JOIN = "join one with `ray start --address=HEAD:6379`, start one with `ray start --head`, or leave out --ray"
_SHARE = "put the source and the output on a filesystem that all nodes mount under the same path"


@dataclass(frozen=True)
class Job:
    """What one task does.

    Attributes:
        source: folder of the source.
        files: `fingerprint` of the source where the driver runs.
        config: config.json of the checkpoint.
        ranks: to write.
        folder: where to write them.
        version: trtkit's, where the driver runs.
    """

    source: Path
    files: dict[str, str]
    config: dict[str, Any]
    ranks: list[int]
    folder: Path
    options: Options
    version: str = __version__


@dataclass(frozen=True)
class Outcome:
    """What became of a job on a node: errors that the user can act on travel as values, everything else as a bug."""

    node: str
    result: Written | TrtkitError | OSError


def over_ray(address: str, *, on_written: OnWritten = lambda ranks, node: None) -> WriteRanks:
    """A `WriteRanks` that works on the nodes of a running Ray cluster; it never starts one.

    Args:
        address: `host:port` of the cluster that this machine is a node of, `ray://host:port` from elsewhere, or `auto`:
            that of the environment variable RAY_ADDRESS, else the one that runs on this machine.
        on_written: called with ranks that are finished and the node that wrote them, as `address/node id`.

    Raises (when it is called):
        LacksError: Ray is not installed, no cluster answers, its nodes share no filesystem with this one or have
            another trtkit, or a worker died repeatedly.
        InputError: what `write_ranks` raises.
        OSError: a disk is full or fails.
    """

    def write(
        plan: Plan, source: Source, folder: Path, options: Options, progress: Progress, advance: Callable[[int], None]
    ) -> None:
        if len(progress.finished) == len(plan.ranks):
            return
        origin, files = source.path.absolute(), fingerprint(source)

        def done(job: Job, outcome: Outcome) -> None:
            if isinstance(outcome.result, BaseException):
                raise outcome.result
            for rank in job.ranks:
                (job.folder / rank_file(rank)).replace(folder / rank_file(rank))
            job.folder.rmdir()
            progress.finish(outcome.result, sync=options.sync)
            advance(sum(plan.rank_bytes(rank) for rank in job.ranks))
            on_written(job.ranks, outcome.node)

        with _connected(address) as ray, _scratch(folder) as scratch:
            groups = share_out(plan, progress.finished, _count_nodes(ray, address))
            _run(ray, [Job(origin, files, plan.config, ranks, scratch, options) for ranks in groups], done)

    return write


def share_out(plan: Plan, finished: Collection[int], nodes: int) -> list[list[int]]:
    """The ranks that are not finished, in one group per task.

    The ranks of a stage read the same source tensors, so they stay together as far as all nodes get equally many
    groups: then a node reads a tensor once and writes it into all its ranks.
    """
    missing = [[rank for rank in ranks if rank not in finished] for ranks in plan.stages()]
    stages = [ranks for ranks in missing if ranks]
    parts = nodes // math.gcd(nodes, len(stages))
    groups = []
    for ranks in stages:
        count = min(parts, len(ranks))
        cuts = [len(ranks) * part // count for part in range(count + 1)]
        groups += [ranks[start:stop] for start, stop in itertools.pairwise(cuts)]
    return groups


def fingerprint(source: Source) -> dict[str, str]:
    """File of a source -> digest of its size, its header and samples all over its weights.

    Unlike `Source.identity` it is the same on all machines that see the same files, or copies of them: network
    filesystems give them other device and inode numbers, and copies have other times.
    """
    found = {"config.json": hashlib.sha256((source.path / "config.json").read_bytes()).hexdigest()}
    for path in sorted({entry.path for entry in source.tensors.values()}):
        header, size = header_bytes(path)
        digest = hashlib.sha256(b"%d\n%b" % (size, header))
        start = 8 + len(header)
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, start + (size - start) * sample // SAMPLES))
        found[path.name] = digest.hexdigest()
    return found


def write_job(job: Job) -> Outcome:
    """What runs on a node, as a Ray task."""
    import ray

    address = ray.util.get_node_ip_address()
    node = f"{address}/{ray.get_runtime_context().get_node_id()}"
    try:
        return Outcome(node, _write(job, f"Ray node {address} ({socket.gethostname()})"))
    except (TrtkitError, OSError) as error:
        return Outcome(node, error)


def _write(job: Job, node: str) -> Written:
    if job.version != __version__:
        raise LacksError(
            f"{node} has trtkit {__version__}, this machine {job.version}", "install the same version on all nodes"
        )
    if not job.folder.is_dir():
        raise LacksError(f"{node}: the folder {job.folder} does not exist there", _SHARE)
    try:
        source = open_source(job.source)
        files = fingerprint(source)
    except (InputError, OSError) as error:  # it could be opened where the driver runs
        raise LacksError(f"{node}: {error}", _SHARE) from error
    for name in sorted(job.files.keys() | files.keys()):
        if job.files.get(name) != files.get(name):
            raise LacksError(f"{node}: {job.source / name} is not the same file there", _SHARE)
    options = job.options
    return write_ranks(
        plan_checkpoint(job.config),
        source_tensors(source),
        job.folder,
        job.ranks,
        checksum=options.checksum,
        saturate=options.saturate,
        sync=options.sync,
    )


def _run(ray: Any, jobs: list[Job], done: Callable[[Job, Outcome], None]) -> None:
    """Has all jobs done, each attempt in a folder of its own within the job's; calls `done` as they come back."""
    # What Ray itself repeats would write into the folder of an attempt that may only have lost its connection.
    task = ray.remote(write_job).options(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")
    running: dict[Any, tuple[Job, int]] = {}

    def start(job: Job, scratch: Path, attempt: int) -> None:
        placed = replace(job, folder=scratch / f"rank{job.ranks[0]}-{attempt}")
        placed.folder.mkdir()
        running[task.remote(placed)] = placed, attempt

    try:
        for job in jobs:
            start(job, job.folder, 1)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            job, attempt = running.pop(ready)
            outcome = _collect(ray, ready, job, attempt)
            if outcome is None:
                shutil.rmtree(job.folder, ignore_errors=True)
                start(job, job.folder.parent, attempt + 1)
            else:
                done(job, outcome)
    except BaseException:
        _cancel(ray, list(running))
        raise


def _collect(ray: Any, reference: Any, job: Job, attempt: int) -> Outcome | None:
    """A job's outcome; None when its worker died and another attempt is due."""
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if missing := re.search(r"No module named '[^']*'", str(error.cause)):
            raise LacksError(
                f"a node of the Ray cluster cannot run trtkit: {missing[0]}",
                f"install trtkit {__version__} on all nodes, where Ray's own Python finds it",
            ) from error
        raise error.cause from error
    except ray.exceptions.RayError as error:
        if attempt < ATTEMPTS:
            return None
        raise LacksError(
            f"the Ray worker for {_ranks(job.ranks)} died {attempt} times: {_one_line(error)}",
            "look for the reason in Ray's logs on its node, then run the same command again",
        ) from error
    return outcome


def _cancel(ray: Any, references: list[Any]) -> None:
    """Stops tasks, and waits a moment so that none still writes where everything is about to be removed."""
    with contextlib.suppress(ray.exceptions.RayError):
        for reference in references:
            ray.cancel(reference, force=True)
        if references:
            ray.wait(references, num_returns=len(references), timeout=CANCEL_SECONDS)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected to a running cluster."""
    try:
        import ray
    except ImportError:
        raise missing_extra("ray", "ray") from None
    if ray.is_initialized():
        raise LacksError("this process is connected to a Ray cluster already", "call ray.shutdown() before")
    target = _reachable(address)
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(target, log_to_driver=False, logging_level=logging.CRITICAL)
        except Exception as error:
            reason = _one_line(error.__cause__ or error)
            raise LacksError(f"the Ray cluster at {target} cannot be joined: {reason}", _JOIN) from error
        finally:
            _restore(signal.SIGTERM, on_terminate)  # Ray sets its own, which would end trtkit without its cleaning up
        yield ray
    finally:
        ray.shutdown()


def _restore(signum: signal.Signals, handler: Any) -> None:
    with contextlib.suppress(ValueError):  # not in the main thread: then Ray did not change it either
        signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def _reachable(address: str) -> str:
    """The address that `auto` stands for, after a try whether something listens: Ray itself waits for minutes.

    Raises:
        LacksError: nothing does.
        InputError: it is no address.
    """
    target = address
    if address == "auto":
        target = os.environ.get("RAY_ADDRESS") or "auto"
    if target == "auto":
        target = _running_cluster()
    _, _, place = target.rpartition("://")
    host, _, port = place.rpartition(":")
    # `local`, with which Ray would start a cluster, is none either.
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"'{target}' is not the address of a Ray cluster", "give HOST:PORT, ray://HOST:PORT or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise LacksError(f"no Ray cluster answers at {target}: {error.strerror or error}", _JOIN) from error
    return target


def _running_cluster() -> str:
    """Address of the cluster that runs on this machine."""
    # Ray's public functions find it only in the course of connecting, without a limit of time.
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        found = None
    if not found:
        raise LacksError("no Ray cluster runs on this machine, and RAY_ADDRESS is not set", _JOIN)
    return str(found)


def _count_nodes(ray: Any, address: str) -> int:
    """Nodes that can run a task."""
    count = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1)
    if not count:
        fix = "add one with `ray start --address=HEAD:6379`"
        raise LacksError(f"no node of the Ray cluster ({address}) has a CPU for tasks", fix)
    return count


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder beside `folder`, on the same filesystem, locked and named so that a later run finds what a dead one left
    (see `store.remove_abandoned`)."""
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.ray-", dir=folder.parent.absolute()))
    lock = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:299]}…"
