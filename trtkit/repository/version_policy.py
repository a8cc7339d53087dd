"""Which versions of a model are served: the version policy in config.pbtxt, as text such as `latest:2`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtkit.errors import InputError


def parse_policy(text: str) -> str:
    """A version policy in its plain form: versions in order, each once.

    Raises:
        InputError: it is none of `latest:N`, `all` and `specific:N,N`.
    """
    kind, _, rest = text.strip().partition(":")
    if text.strip() == "all":
        return "all"
    if kind == "latest" and re.fullmatch(r"[1-9]\d{0,8}", rest):
        return text.strip()
    if kind == "specific" and re.fullmatch(r"\d{1,18}(,\d{1,18})*", rest):
        return "specific:" + ",".join(map(str, sorted({int(number) for number in rest.split(",")})))
    raise InputError(f"'{text}' is no version policy", "write latest:2, all or specific:1,3")


def policy_text(config: Any) -> str:
    """The version policy of a `ModelConfig` message; without one Triton serves the latest version."""
    choice = config.version_policy.WhichOneof("policy_choice")
    if choice == "all":
        return "all"
    if choice == "specific":
        return "specific:" + ",".join(map(str, sorted(set(config.version_policy.specific.versions))))
    return f"latest:{config.version_policy.latest.num_versions}" if choice == "latest" else "latest:1"


def served(versions: Sequence[int], policy: str) -> tuple[int, ...]:
    """The versions that a policy serves, in order."""
    kind, _, rest = policy.partition(":")
    if kind == "latest":
        return tuple(sorted(versions)[max(0, len(versions) - int(rest)) :])
    if kind == "specific":
        wanted = {int(number) for number in rest.split(",") if number}
        return tuple(sorted(wanted & set(versions)))
    return tuple(sorted(versions))


def version_numbers(directory: Path) -> tuple[int, ...]:
    """The versions in a model's directory, in order: folders whose names are numbers without leading zeros."""
    names = [item.name for item in directory.iterdir() if re.fullmatch(r"0|[1-9]\d{0,18}", item.name) and item.is_dir()]
    return tuple(sorted(map(int, names)))


def with_policy(config: Any, policy: str) -> Any:
    """A copy of a `ModelConfig` message with another version policy."""
    changed = type(config)()
    changed.CopyFrom(config)
    changed.ClearField("version_policy")
    kind, _, rest = policy.partition(":")
    if kind == "all":
        changed.version_policy.all.SetInParent()
    elif kind == "latest":
        changed.version_policy.latest.num_versions = int(rest)
    else:
        changed.version_policy.specific.versions.extend(int(number) for number in rest.split(","))
    return changed
