"""What text may be shown, and when a stop sequence ends it.

Pieces of tokens are bytes that may end inside a character; stop sequences may
begin in one token and end in a later one. The result does not depend on where
the borders between tokens lie.
"""

from __future__ import annotations

import codecs


class TextMachine:
    """Turns the pieces of one sequence into text that is never taken back."""

    def __init__(self, stops: tuple[str, ...] = (), *, strip_space: bool = False) -> None:
        """`strip_space` drops one space at the very beginning, where SentencePiece puts one."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = stops
        self._held = ""
        self._strip_space = strip_space
        self._skip = 0

    def skip(self, length: int) -> None:
        """The next `length` characters have been shown before, and are not shown again."""
        self._skip = length

    def push(self, piece: bytes) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop sequence that has matched, if any.

        A match ends the text before it; nothing is pushed afterwards.
        """
        text, stop = self._take(self._decoder.decode(piece))
        return self._unshown(text), stop

    def flush(self) -> tuple[str, str | None]:
        """The rest, at the end of a generation: half characters become U+FFFD."""
        text, stop = self._take(self._decoder.decode(b"", final=True))
        if stop is None:
            text += self._held
            self._held = ""
        return self._unshown(text), stop

    def _unshown(self, text: str) -> str:
        if self._skip and text:
            cut = min(self._skip, len(text))
            self._skip -= cut
            return text[cut:]
        return text

    def _take(self, text: str) -> tuple[str, str | None]:
        if self._strip_space and text:
            text = text.removeprefix(" ")
            self._strip_space = False
        self._held += text
        if not self._stops:
            shown, self._held = self._held, ""
            return shown, None
        end, stop = self._first_match()
        if stop is not None:
            shown, self._held = self._held[: end - len(stop)], ""
            return shown, stop
        cut = len(self._held) - self._open_length()
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, None

    def _first_match(self) -> tuple[int, str | None]:
        """The match that ends first (of those the longest), as reading by character finds it."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            at = self._held.find(stop)
            if at >= 0:
                found = (at + len(stop), -len(stop), stop)
                best = found if best is None else min(best, found)
        return (0, None) if best is None else (best[0], best[2])

    def _open_length(self) -> int:
        """Length of the longest end of the held text that may begin a stop sequence."""
        held = self._held
        return max(
            next((n for n in range(min(len(held), len(stop) - 1), 0, -1) if held.endswith(stop[:n])), 0)
            for stop in self._stops
        )
