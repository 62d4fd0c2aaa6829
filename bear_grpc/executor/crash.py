"""What is known of a worker's death."""

from __future__ import annotations

import signal

import msgspec

from ..suspects import Suspects

# What a worker's stderr writes before the last message of native code that aborts.
NATIVE_MARK = "native abort: "
# Ends that native code makes of bad input. SIGKILL, as by the kernel's out-of-memory killer, is none.
NATIVE_FAULTS = frozenset(
    number.name for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)
)
# A worker whose text thread does not stop ends itself with this code (worker/exits.py).
TEXT_STUCK = "exit code 75"
# Of native faults Python writes the stacks of all threads; this begins the one that has failed.
STACK_BEGINS = "Current thread"
REPORTED_LINES = 8
MAX_LINE = 300


class CrashReport(msgspec.Struct, frozen=True):
    """`how` is the signal or the exit code, `stuck` why the server has ended it; empty if it has not."""

    how: str
    stuck: str = ""
    lines: tuple[str, ...] = ()
    suspects: Suspects = Suspects()

    @property
    def is_native_fault(self) -> bool:
        """Whether native code may have died of what it was given."""
        return not self.stuck and self.how in NATIVE_FAULTS

    @property
    def is_text_stuck(self) -> bool:
        """Whether the worker has ended because of its text job."""
        return self.how == TEXT_STUCK

    @property
    def native_message(self) -> str:
        """What native code said before it aborted; empty if it did not."""
        said = [line.removeprefix(NATIVE_MARK) for line in self.lines if line.startswith(NATIVE_MARK)]
        return said[-1][:MAX_LINE] if said else ""

    @property
    def cause(self) -> str:
        """In a few words: what ended it."""
        return f"stuck: {self.stuck}" if self.stuck else self.how

    def describe(self) -> str:
        """All of it, in several lines."""
        parts = [f"the worker ended: {self.cause}"]
        if self.native_message:
            parts.append(f"native code said: {self.native_message}")
        if self.suspects.sequences:
            parts.append(f"sequences in its step: {', '.join(map(str, self.suspects.sequences))}")
        if self.suspects.text_job:
            parts.append(f"text job: {self.suspects.text_job}")
        if told := self._told():
            parts.append("it wrote:\n" + "\n".join(f"  {line[:MAX_LINE]}" for line in told))
        return "\n".join(parts)

    def _told(self) -> list[str]:
        """The last lines, or those of the stack that has failed."""
        lines = [line for line in self.lines if not line.startswith(NATIVE_MARK)]
        begin = next((place for place, line in enumerate(lines) if line.startswith(STACK_BEGINS)), None)
        return lines[-REPORTED_LINES:] if begin is None else lines[begin : begin + REPORTED_LINES]
