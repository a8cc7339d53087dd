"""Compiling a checkpoint with trtllm-build: on this machine, or in the release's container.

`plan_build` says what would run, `run_build` runs it. The engine grows in a temporary sibling folder and appears under
its name only when it is complete; a failure, Ctrl-C or SIGTERM (which the command line turns into KeyboardInterrupt)
stops trtllm-build with all its workers, or its container, and leaves nothing but the log.

Neither the real trtllm-build nor a real Docker engine was run: the tests' stand-ins check every argument. Docker's own
client (28.2) was given the docker line once, and the request that it made of it was the one meant.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trtkit import __version__, releases
from trtkit.checkpoint import Checkpoint, open_checkpoint
from trtkit.config import BuildConfig, EngineConfig
from trtkit.docker_cli import ULIMITS, Mount, gpus_option
from trtkit.engine.failures import diagnose
from trtkit.engine.options import refuse_inert_reduce_fusion, trtllm_build_args
from trtkit.engine.process import follow
from trtkit.engine.result import check_built, same_version, wrong_version
from trtkit.engine_files import Engine, read_engine
from trtkit.errors import InputError, LacksError
from trtkit.store import atomic_dir, atomic_write

PROGRAM = "trtllm-build"
MANIFEST = "trtkit-engine.json"
"""What made the engine. Not `trtkit.json`: the artifact store writes that one into the same folder."""

IN_CONTAINER = {"checkpoint": "/checkpoint", "engine": "/engine"}
_BANNER = re.compile(r"TensorRT[- ]LLM version: (\d\S*)")


@dataclass(frozen=True)
class BuildCommand:
    """What compiles one checkpoint.

    Attributes:
        builder: `local` or `docker`.
        settings: the engine's settings.
        checkpoint_dir, engine_dir: absolute folders on this machine; `engine_dir` does not exist yet.
        release, tensorrt_llm: the release and the TensorRT-LLM version that has to compile and will run the engine.
        tp, pp: what the checkpoint's mapping must say.
        architecture: of the checkpoint, where it was known when planning.
        env: variables set for trtllm-build on top of the inherited ones (docker: inside the container).
        image: container image; None for the local builder.
        gpus, shm_size, user: values of docker's options; `user` "" keeps the image's.
        container: name of the container.
    """

    builder: Literal["local", "docker"]
    settings: EngineConfig
    checkpoint_dir: Path
    engine_dir: Path
    release: str
    tensorrt_llm: str
    tp: int
    pp: int
    architecture: str | None
    env: dict[str, str]
    image: str | None
    gpus: str
    shm_size: str
    user: str
    container: str

    @property
    def argv(self) -> list[str]:
        """The command. `run_build` changes two words of it: the output folder and the container's name."""
        return self.argv_into(self.engine_dir, self.container)

    @property
    def line(self) -> str:
        """The command as a line for a shell."""
        prefix = [f"{key}={value}" for key, value in self.env.items()] if self.builder == "local" else []
        return shlex.join([*prefix, *self.argv])

    def mounts_into(self, output: Path) -> list[Mount]:
        if self.builder == "local":
            return []
        return [
            Mount(self.checkpoint_dir, IN_CONTAINER["checkpoint"], read_only=True),
            Mount(output, IN_CONTAINER["engine"], read_only=False),
        ]

    def argv_into(self, output: Path, container: str) -> list[str]:
        if self.image is None:
            return [PROGRAM, *self._arguments(str(self.checkpoint_dir), str(output))]
        # --init reaps the workers.
        options = ["--rm", "--init", "--name", container, "--gpus", self.gpus]
        options += ["--shm-size", self.shm_size, *ULIMITS]
        if self.user:
            options += ["--user", self.user]
        for key, value in self.env.items():
            options += ["--env", f"{key}={value}"]
        for mount in self.mounts_into(output):
            options += ["--mount", mount.option()]
        inside = self._arguments(IN_CONTAINER["checkpoint"], IN_CONTAINER["engine"])
        return ["docker", "run", *options, "--workdir", "/tmp", self.image, PROGRAM, *inside]  # noqa: S108

    def _arguments(self, checkpoint: str, output: str) -> list[str]:
        return trtllm_build_args(
            self.settings,
            checkpoint,
            output,
            tensorrt_llm_version=self.tensorrt_llm,
            tp=self.tp,
            architecture=self.architecture,
        )


def plan_build(
    config: BuildConfig,
    checkpoint_dir: str | Path,
    engine_dir: str | Path,
    *,
    architecture: str | None = None,
    user: str | None = None,
) -> BuildCommand:
    """What `run_build` would run. Reads and changes nothing: the checkpoint need not exist yet.

    Args:
        config: its `engine`, `checkpoint` and `deploy` sections matter.
        checkpoint_dir: the checkpoint.
        engine_dir: where the engine goes.
        architecture: `architecture` of the checkpoint, if known, for settings that only some architectures have.
        user: `UID:GID` that the container runs as; None takes this process's, so that the engine is not root's.
            Rootless Docker maps ids by itself: give "" there.

    Raises:
        InputError: the release is unknown or has no engine builder, or settings contradict each other.
    """
    release = releases.get(config.deploy.release)
    docker = config.engine.builder == "docker"
    if docker:
        _check_gpus(config.deploy.gpu_ids, config.engine.workers)
    uid = user if user is not None else "" if os.getuid() == 0 else f"{os.getuid()}:{os.getgid()}"
    # Python buffers what it prints into a pipe, so a build would look stuck. PyTorch looks up the user's name and
    # writes below HOME, and a bare uid has neither in the image.
    env = {"PYTHONUNBUFFERED": "1", **({"HOME": "/tmp", "USER": "trtkit"} if docker and uid else {})}  # noqa: S108
    command = BuildCommand(
        builder=config.engine.builder,
        settings=config.engine,
        checkpoint_dir=Path(checkpoint_dir).absolute(),
        engine_dir=Path(engine_dir).absolute(),
        release=release.tag,
        tensorrt_llm=release.tensorrt_llm,
        tp=config.checkpoint.tp,
        pp=config.checkpoint.pp,
        architecture=architecture,
        env=env,
        image=(config.deploy.image or release.image) if docker else None,
        gpus=gpus_option(config.deploy.gpu_ids),
        shm_size=config.deploy.shm_size,
        user=uid if docker else "",
        container=f"trtkit-build-{config.name}",
    )
    _ = command.argv  # what cannot be written as a command should fail now, not when the checkpoint is done
    return command


def run_build(
    command: BuildCommand,
    *,
    on_line: Callable[[str], None] | None = None,
    log: Path | None = None,
    replace: bool = False,
    checkpoint_digest: str | None = None,
) -> Engine:
    """Compiles the engine and publishes it under `command.engine_dir`, whole or not at all.

    Args:
        command: from `plan_build`.
        on_line: called with each line that trtllm-build prints, without its line end.
        log: file for those lines; kept whatever happens. None: `<engine_dir>.log`.
        replace: swap with an engine that exists already.
        checkpoint_digest: goes into the manifest.

    Raises:
        InputError: the checkpoint is not the planned one, or `engine_dir` exists and `replace` is off.
        LacksError: the program, a GPU, disk space or the Docker engine is missing.
        TrtkitError: trtllm-build failed, or left an incomplete engine; quotes the end of its log.
    """
    with atomic_dir(command.engine_dir, replace=replace) as folder:
        compile_into(command, folder, on_line=on_line, log=log, checkpoint_digest=checkpoint_digest)
    return read_engine(command.engine_dir)


def compile_into(
    command: BuildCommand,
    folder: Path,
    *,
    on_line: Callable[[str], None] | None = None,
    log: Path | None = None,
    checkpoint_digest: str | None = None,
) -> Engine:
    """Like `run_build`, into an empty folder that the caller publishes (the artifact store does)."""
    checkpoint = open_checkpoint(command.checkpoint_dir)
    _check_checkpoint(command, checkpoint)
    _check_program(command)
    _check_disk(folder, checkpoint.nbytes)
    log = log or command.engine_dir.with_name(command.engine_dir.name + ".log")
    container = f"{command.container}-{secrets.token_hex(4)}"
    argv = command.argv_into(folder, container)
    started = time.time()
    tail, returncode = follow(
        argv,
        env=command.env if command.builder == "local" else {},
        log=log,
        on_line=_watcher(command.tensorrt_llm, on_line),
        on_stop=["docker", "kill", container] if command.builder == "docker" else None,
    )
    if returncode != 0:
        raise diagnose(returncode, tail, log)
    engine = check_built(folder, checkpoint.config, command.tensorrt_llm)
    manifest = {
        "argv": argv,
        "builder": command.builder,
        "image": command.image,
        "release": command.release,
        "tensorrt_llm": engine.version,
        "trtkit": __version__,
        "checkpoint": checkpoint_digest,
        "started": int(started),
        "seconds": round(time.time() - started, 1),
    }
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return engine


def _watcher(wanted: str, on_line: Callable[[str], None] | None) -> Callable[[str], None]:
    """Passes lines on, and stops the build when the banner in the first second names another TensorRT-LLM."""

    def watch(line: str) -> None:
        if on_line is not None:
            on_line(line)
        banner = _BANNER.search(line)
        if banner is not None and not same_version(banner[1], wanted):
            raise wrong_version(banner[1], wanted)

    return watch


def _check_checkpoint(command: BuildCommand, checkpoint: Checkpoint) -> None:
    if (checkpoint.tp, checkpoint.pp) != (command.tp, command.pp):
        raise InputError(
            f"{checkpoint.path} is for TP {checkpoint.tp} and PP {checkpoint.pp}, "
            f"the build config says TP {command.tp} and PP {command.pp}",
            "convert again, or change checkpoint.tp and checkpoint.pp",
        )
    if command.settings.reduce_fusion:
        refuse_inert_reduce_fusion(checkpoint.tp, checkpoint.config["architecture"])


def _check_program(command: BuildCommand) -> None:
    if command.builder == "local" and shutil.which(PROGRAM) is None:
        raise LacksError(
            f"{PROGRAM} is not on PATH",
            "set engine.builder: docker, or pip install 'trtkit[tensorrt-llm]' on a machine with a GPU",
        )
    if command.builder == "docker" and shutil.which("docker") is None:
        raise LacksError(
            "docker is not on PATH", "install Docker and the NVIDIA container toolkit, or set engine.builder: local"
        )


def _check_disk(folder: Path, needed: int) -> None:
    """An engine holds the checkpoint's weights, so less room than those take is a failure hours from now."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise LacksError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, the engine needs about {needed / 1e9:.1f} GB",
            "free disk space or choose another output folder",
        )


def _check_gpus(ids: Sequence[str] | None, workers: int) -> None:
    if ids is not None and len(ids) < workers:
        raise InputError(
            f"engine.workers ({workers}) compile on a GPU each, and deploy.gpus names {len(ids)}",
            "lower engine.workers or name more GPUs",
        )
