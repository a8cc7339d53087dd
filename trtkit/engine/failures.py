"""Why trtllm-build or `docker run` failed, read from the log, with the way out.

The texts are those that PyTorch, TensorRT, TensorRT-LLM and the Docker command line are known to print; they were
collected from general experience with them, and none was provoked by running them here.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from pathlib import Path

from trtkit.errors import InputError, LacksError, TrtkitError

QUOTED = 6
"""Log lines that an error quotes."""

_ERROR = re.compile(r"\[E\]|error|exception|assert|not provided|fatal", re.IGNORECASE)

# Text in the log, error class, fix. The first that fits wins, so what is specific stands before what is general.
_KNOWN: tuple[tuple[str, type[TrtkitError], str], ...] = (
    (
        r"Cannot connect to the Docker daemon|permission denied while trying to connect to the Docker",
        LacksError,
        "start Docker, and let this user reach it (group `docker`), or set engine.builder: local",
    ),
    (
        r"could not select device driver|nvidia-container-cli|unknown runtime.*nvidia",
        LacksError,
        "install the NVIDIA container toolkit on this machine, or build on one that has a GPU",
    ),
    (
        r"manifest unknown|manifest for .* not found|pull access denied|repository does not exist",
        InputError,
        "check deploy.release and deploy.image; `docker login nvcr.io` if the registry asks for it",
    ),
    (r"No space left on device|disk quota exceeded", LacksError, "free disk space and build again"),
    (
        r"CUDA driver version is insufficient|forward compatibility was attempted",
        LacksError,
        "update the NVIDIA driver; `trtkit releases` shows which one each release needs",
    ),
    (
        r"no CUDA-capable device|libcuda\.so\.1: cannot open|Found no NVIDIA driver|No CUDA GPUs are available",
        LacksError,
        "build on a machine with an NVIDIA GPU, of the model that will serve the engine",
    ),
    (
        r"no kernel image is available|[Uu]nsupported (SM|GPU architecture)",
        LacksError,
        "this GPU and this release do not go together: choose another deploy.release or another GPU",
    ),
    (
        r"CUDA out of memory|OutOfMemory|out of memory|cudaErrorMemoryAllocation|Requested amount of GPU memory",
        TrtkitError,
        "lower engine.max_batch_size or engine.max_num_tokens, stop what else uses the GPU, or raise checkpoint.tp",
    ),
    (
        r"Required but not provided tensors",
        InputError,
        "the checkpoint lacks tensors that this TensorRT-LLM wants: convert again and run `trtkit verify`",
    ),
    (
        r"Unsupported model architecture",
        InputError,
        "this TensorRT-LLM has no engine for the architecture: choose a newer deploy.release",
    ),
    (
        r"unrecognized arguments|invalid choice",
        InputError,
        "trtllm-build is another version than the release's: check deploy.image, or what PATH finds",
    ),
    (
        r"got an unexpected keyword argument",
        InputError,
        "the checkpoint was written for another TensorRT-LLM: convert again, for this deploy.release",
    ),
    (
        r"BrokenProcessPool|oom-kill",
        LacksError,
        "a worker died, as a rule for lack of host memory: lower engine.workers or add memory",
    ),
)


def diagnose(returncode: int, lines: Sequence[str], log: Path) -> TrtkitError:
    """The error for a build that ended with `returncode` (negative: killed by that signal) after printing `lines`."""
    quoted = "".join(f"\n| {line}" for line in _telling(lines))
    cause = f"trtllm-build failed, {_ending(returncode)}; log: {log}{quoted}"
    text = "\n".join(lines)
    for pattern, error, fix in _KNOWN:
        if re.search(pattern, text):
            return error(cause, fix)
    if returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return LacksError(
            cause, "as a rule the kernel does that for lack of host memory: lower engine.workers or add memory"
        )
    return TrtkitError(cause, f"read {log}")


def _ending(returncode: int) -> str:
    number = -returncode if returncode < 0 else returncode - 128
    if number in set(signal.Signals):
        return f"killed by {signal.Signals(number).name}"
    return f"exit status {returncode}"


def _telling(lines: Sequence[str]) -> list[str]:
    """The last lines that look like an error, or else the last lines, shortened to a readable width."""
    full = [line.rstrip() for line in lines if line.strip()]
    errors = [line for line in full if _ERROR.search(line)]
    return [line if len(line) <= 300 else line[:297] + "..." for line in (errors or full)[-QUOTED:]]
