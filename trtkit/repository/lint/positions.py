"""On which line of a config.pbtxt a field is. The parser does not keep that, and only findings need it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<skip>[\s:;,]+|\#[^\n]*)
      | (?P<text>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
      | (?P<word>[-+.\w]+)
      | (?P<open>[{<])
      | (?P<close>[}>])
      | (?P<list>\[)
      | (?P<end>\])
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


@dataclass
class _Message:
    """A message that is being read: the path of its fields, the field whose value comes next, whether in a list."""

    path: str
    field: str = ""
    in_list: bool = False

    def done(self) -> None:
        if not self.in_list:
            self.field = ""


def line_numbers(text: str) -> dict[str, int]:
    """Line, from 1, of each field: `max_batch_size`, `input[0].name`, `input[0].dims[1]`. Repeated fields count from 0;
    without a number a name means the first."""
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    stack = [_Message("")]
    line = 1

    def add(field: str) -> str:
        """Notes one more of the field, and returns its path with the number."""
        number = counts.get(field, 0)
        counts[field] = number + 1
        lines.setdefault(field, line)
        lines[f"{field}[{number}]"] = line
        return f"{field}[{number}]"

    for match in _TOKEN.finditer(text):
        kind, token, message = match.lastgroup, match.group(), stack[-1]
        if kind == "word" and not message.field:
            message.field = message.path + token
        elif kind in ("word", "text") and message.field:
            add(message.field)
            message.done()
        elif kind == "list":
            message.in_list = True
        elif kind == "end":
            message.in_list = False
            message.done()
        elif kind == "open":
            stack.append(_Message(add(message.field) + "."))
        elif kind == "close" and len(stack) > 1:
            stack.pop()
            stack[-1].done()
        line += token.count("\n")
    return lines
