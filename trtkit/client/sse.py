"""Server-sent events: an incremental parser of `text/event-stream` (WHATWG HTML standard, section 9.2.6)."""

from __future__ import annotations

import codecs


class EventParser:
    """Turns bytes, cut anywhere, into the data of the events they complete.

    Understands LF, CRLF and CR line ends, several `data` lines per event, comments, other fields (ignored) and a
    leading byte order mark. As in the standard, an event that no blank line ends is not an event.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._rest = ""
        self._after_cr = False
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[str]:
        """The data of every event that `piece` completes, in order."""
        text = self._decoder.decode(piece)
        if self._after_cr and text:
            text = text.removeprefix("\n")  # the second half of a CRLF whose CR has already ended the line
            self._after_cr = False
        if text.endswith("\r"):
            self._after_cr = True
        # Only the three line ends of the standard: str.splitlines would also cut at U+2028 and others inside the data.
        *lines, tail = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        if lines:
            lines[0] = self._rest + lines[0]
            self._rest = tail
        else:
            self._rest += tail
        events = [self._line(line) for line in lines]
        return [event for event in events if event is not None]

    def _line(self, line: str) -> str | None:
        """Takes one whole line; the event's data when the line ends one."""
        if not line:
            data, self._data = self._data, []
            return "\n".join(data) if data else None
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
        return None
