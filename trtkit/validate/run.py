"""Runs the checks: the one place that knows them all."""

from __future__ import annotations

import difflib
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from trtkit.client.api import LLMClient, ProtocolName, connect, unreachable
from trtkit.client.served import BY_TOPOLOGY
from trtkit.config import BuildConfig
from trtkit.errors import InputError, LacksError, TrtkitError
from trtkit.findings import Finding
from trtkit.validate import bad_requests, cancellation, chat, contract, parity, streaming, text
from trtkit.validate.results import CheckResult, Subject, result
from trtkit.validate.source import position_limit, require_torch

Check = Callable[[Subject, Sequence[LLMClient]], Awaitable[CheckResult]]

CHECKS: dict[str, Check] = {
    contract.NAME: contract.check,
    parity.TOKENS: parity.check_tokens,
    text.NAME: text.check,
    streaming.NAME: streaming.check,
    chat.NAME: chat.check,
    cancellation.NAME: cancellation.check,
    bad_requests.NAME: bad_requests.check,
}
"""By name, in the order in which they run: what explains later failures first, what may break the server last."""

_NEED_SOURCE = (parity.TOKENS, text.NAME, chat.NAME)


def subject_of(
    config: BuildConfig,
    *,
    source: Path | None = None,
    model: str | None = None,
    engine: str | None = None,
    timeout_s: float = 60.0,
) -> Subject:
    """What a build config says about the model that it serves.

    Args:
        source: folder of the source; None takes model.source where that is a local folder.
        model, engine: names; None takes those that the topology has.
    """
    local = Path(config.model.source).expanduser()
    folder = source or (local if local.is_dir() else None)
    limit = position_limit(folder) if folder else None
    usual = BY_TOPOLOGY[config.serving.layout or "ensemble"]
    template = config.serving.chat_template
    engine_limits = config.serving.runtime == "tensorrtllm"
    return Subject(
        model=model or usual.text,
        engine=engine or usual.engine,
        prompts=tuple(config.validation.prompts),
        max_tokens=config.validation.max_tokens,
        source=folder,
        dtype=checkpoint_dtype(config.checkpoint.dtype, folder),
        streaming=config.serving.streaming,
        max_batch_size=config.serving.max_batch_size,
        max_running=config.engine.max_batch_size if engine_limits else None,
        max_input_len=config.engine.max_input_len if engine_limits else None,
        max_seq_len=config.engine.max_seq_len or limit,
        chat_template=Path(template) if template else None,
        add_special_tokens=config.serving.add_special_tokens,
        trust_remote_code=config.model.trust_remote_code,
        timeout_s=timeout_s,
    )


def checkpoint_dtype(dtype: str, source: Path | None) -> str | None:
    """The dtype that `auto` stands for: the source's, with float32 becoming float16. None when nothing tells."""
    if dtype != "auto":
        return dtype
    if source is None:
        return None
    try:
        raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = raw.get("dtype") or raw.get("torch_dtype")
    return found if found in ("float16", "bfloat16") else "float16"


def choose(only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[str]:
    """Names of the checks to run.

    Raises:
        InputError: an unknown name, or nothing is left to run.
    """
    for name in [*only, *skip]:
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, n=1)
            raise InputError(
                f"no check '{name}'{f', did you mean {near[0]!r}?' if near else ''}", f"valid: {', '.join(CHECKS)}"
            )
    names = [name for name in CHECKS if (not only or name in only) and name not in skip]
    if not names:
        raise InputError("--only and --skip leave no check to run", "leave one of them out")
    return names


async def run_checks(
    urls: Sequence[str],
    subject: Subject,
    *,
    protocol: ProtocolName | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    on_progress: Callable[[str], None] | None = None,
) -> list[CheckResult]:
    """Runs checks against one server.

    Args:
        urls: how to reach it; with gRPC and HTTP, both are checked.
        protocol: of urls that do not say theirs.
        only, skip: names of checks.
        on_progress: is told the name of each check as it starts.

    Returns:
        One result per check. A check that the server's errors or the source keep from its end has failed.

    Raises:
        InputError: an unknown check, or none; a bad url; no prompts; or `only` names a check that needs a source, and
            there is none.
        LacksError: nobody listens at a url, or torch is missing and parity is asked for.
    """
    names = choose(only, skip)
    if not subject.prompts:
        raise InputError("there are no prompts to send", "set validation.prompts")
    compared = [name for name in names if name in _NEED_SOURCE]
    if compared and subject.source is not None:
        require_torch()
    elif asked := [name for name in compared if name in only]:
        raise InputError(f"check '{asked[0]}' has no source to compare with", "give --source DIR")
    results = []
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(connect(url, model=subject.model, protocol=protocol)) for url in urls
        ]
        for client in clients:
            if not await client.is_live(timeout_s=subject.lookup_s):
                raise unreachable(client.url, "no live Triton server answers there")
        for name in names:
            if on_progress:
                on_progress(name)
            results.append(await _run(name, subject, clients))
    return results


async def _run(name: str, subject: Subject, clients: Sequence[LLMClient]) -> CheckResult:
    try:
        return await CHECKS[name](subject, clients)
    except LacksError as error:
        place, cause, fix = "server", error.cause, error.fix
    except TrtkitError as error:
        place, cause, fix = subject.model, error.cause, error.fix
    return result(name, "the check could not finish", [Finding("TK700", "error", place, cause, fix)])
