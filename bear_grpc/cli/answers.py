"""The answers of one request on stdout, one after the other, and their numbers on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bear_grpc.cli import output

if TYPE_CHECKING:
    from bear_grpc.v1.inference_service_pb2 import Completed, GenerateResponse, Token


class Answers:
    """Takes events in any order of answers; shows each answer whole before the next.

    The one that is shown streams, the later ones are kept meanwhile.
    """

    def __init__(self, n: int = 1, *, quiet: bool = False) -> None:
        self._n = n
        self._quiet = quiet
        self._is_terminal = sys.stdout.isatty()
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._tokens: list[list[Token]] = [[] for _ in range(n)]
        self._ends: list[Completed | None] = [None] * n
        self._at = 0  # the answer that is shown
        self._begun = False

    def text(self, index: int = 0) -> str:
        """What has come of an answer."""
        return "".join(self._texts[index])

    def add(self, event: GenerateResponse) -> None:
        """An event of the stream; all but text and endings are left out."""
        index = event.index
        if event.HasField("delta"):
            self._texts[index].append(event.delta.text)
            self._tokens[index].extend(event.delta.tokens)
            if index == self._at:
                self._show(event.delta.text)
        elif event.HasField("completed"):
            self._ends[index] = event.completed
            self._go_on()

    def close(self) -> None:
        """What follows on stderr begins on a line of its own, whatever ended the answer."""
        if self._at < self._n and self._begun:
            self._end_line()

    def _go_on(self) -> None:
        """Ends what has its ending and begins what follows."""
        while self._at < self._n and (completed := self._ends[self._at]) is not None:
            self._show("")
            self._end_line()
            if not self._quiet:
                self._note_end(completed)
            self._at += 1
            self._begun = False
            if self._at < self._n and self._texts[self._at]:
                self._show(self.text(self._at))

    def _show(self, text: str) -> None:
        if not self._begun:
            self._begun = True
            if self._n > 1 and not self._quiet:
                output.note(f"--- answer {self._at + 1} of {self._n}")
        sys.stdout.write(output.printable(text) if self._is_terminal else text)
        sys.stdout.flush()

    def _end_line(self) -> None:
        text = self.text(self._at)
        if text and not text.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()

    def _note_end(self, completed: Completed) -> None:
        for token in self._tokens[self._at]:
            output.note(likelihood(token))
        output.note(statistics(completed))


def likelihood(token: Token) -> str:
    """A token, its log probability, and the most likely ones at its place."""
    top = "  ".join(f"{_literal(other.piece)} {other.logprob:.3f}" for other in token.top)
    own = f"{token.logprob:9.3f}" if token.HasField("logprob") else " " * 9
    return f"{own}  {_literal(token.piece):<16}{top}".rstrip()


def _literal(piece: bytes) -> str:
    return repr(piece.decode("utf-8", "backslashreplace"))


def statistics(completed: Completed) -> str:
    """An answer's numbers in one line."""
    from bear_grpc.v1.inference_service_pb2 import FinishReason

    usage, timings = completed.usage, completed.timings
    cached = f" ({usage.cached_token_count} cached)" if usage.cached_token_count else ""
    reason = FinishReason.DESCRIPTOR.values_by_number.get(completed.finish_reason)
    # Of several answers the first counts the prompt.
    prompt = [f"{usage.prompt_token_count} prompt tokens{cached}"] if usage.prompt_token_count else []
    parts = [
        *prompt,
        f"{usage.completion_token_count} completion tokens",
        f"{timings.decode_tokens_per_second:.1f} tokens/s",
        f"TTFT {output.seconds(timings.ttft_seconds)}",
        reason.name.removeprefix("FINISH_REASON_") if reason else str(completed.finish_reason),
    ]
    if completed.HasField("constraint_satisfied") and not completed.constraint_satisfied:
        parts.append("constraint not satisfied")
    return ", ".join(parts)
