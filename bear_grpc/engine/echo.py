"""The prompt as part of the text, as its tokens have been read."""

from __future__ import annotations

import codecs


class Echo:
    """Turns a prompt's tokens into text, in order and each once.

    Stop sequences do not count here: they end what is generated.
    """

    def __init__(self, *, strip_space: bool = False) -> None:
        """`strip_space` drops the space that SentencePiece puts before a text."""
        self.told = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = strip_space

    def push(self, pieces: list[bytes], *, is_last: bool) -> str:
        """Text of the next tokens; half a character waits for the next ones unless `is_last`."""
        self.told += len(pieces)
        text = self._decoder.decode(b"".join(pieces), final=is_last)
        if self._strip_space and text:
            text = text.removeprefix(" ")
            self._strip_space = False
        return text
