"""config.pbtxt, parsed. The models of a repository have most of their blocks in common, and each is parsed only once:
the parser is written in Python and takes 3 ms for a config of 600 lines, most of the time of a linter.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from trtkit import pbtxt

_ENTRY = re.compile(
    r"(?:[ \t]*(?:\#[^\n]*)?\n)*"  # empty lines and comments
    r"(?P<entry>(?P<name>\w+)(?::[^\n{<\[]*\n|[ \t]*\{[ \t]*\n(?:[ \t][^\n]*\n|\n)*\}[ \t]*\n))"
)
"""One field the way Triton's own printer writes it: on a line, or a block whose inside is indented."""


def parse(text: str, place: str) -> Any:
    """Like `pbtxt.loads`.

    Raises:
        PbtxtError: the text breaks Triton's schema.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    text_, end = text.rstrip() + "\n", 0
    given: set[str] = set()
    parts = []
    while end < len(text_):
        match = _ENTRY.match(text_, end)
        if match is None:
            return pbtxt.loads(text, place)
        try:
            part, names = _parse_entry(match["entry"])
        except pbtxt.PbtxtError:  # lines have to be counted from the start
            return pbtxt.loads(text, place)
        if given & names:  # given twice, which is for the parser to judge
            return pbtxt.loads(text, place)
        given |= names
        parts.append(part)
        end = match.end()
    return pb.ModelConfig.FromString(b"".join(parts))


@functools.lru_cache(maxsize=8192)
def _parse_entry(text: str) -> tuple[bytes, frozenset[str]]:
    """A field in the wire format, in which fields one behind the other make a message, and what may not come again: the
    names of fields that are not repeated, and those of a oneof under its own name."""
    message = pbtxt.loads(text)
    # A field with its default value is not listed.
    given = {field.name for field, _ in message.ListFields()} | {re.split(r"\W", text, maxsplit=1)[0]}
    fields = (message.DESCRIPTOR.fields_by_name[name] for name in given)
    names = {
        field.containing_oneof.name if field.containing_oneof else field.name
        for field in fields
        if not _is_repeated(getattr(message, field.name))
    }
    return bytes(message.SerializeToString()), frozenset(names)


def _is_repeated(value: object) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes))
