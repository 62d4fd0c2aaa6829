"""Shows that a long command is alive: one line that changes on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

LOG_INTERVAL_S = 10.0
TERMINAL_INTERVAL_S = 0.2


class Status:
    """The state of one long step, written to stderr with the time since its start.

    A thread repeats the line, so that a compiler that is silent for a minute does not look dead.
    """

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self._title = title
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._text = ""
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def update(self, text: str) -> None:
        """Set what the step is doing now; shown at the next repetition."""
        self._text = text

    def start(self) -> None:
        if not self._terminal:
            self._write(f"{self._title} ...")
        self._thread.start()

    def stop(self, result: str) -> None:
        """End the line with `result`."""
        self._ended.set()
        self._thread.join()
        self._write(f"{self._title}: {result} ({clock(self.elapsed_s)})", last=True)

    def _repeat(self) -> None:
        interval = TERMINAL_INTERVAL_S if self._terminal else LOG_INTERVAL_S
        while not self._ended.wait(interval):
            self._write(f"{self._title} {clock(self.elapsed_s)} {self._text}")

    def _write(self, line: str, *, last: bool = False) -> None:
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            line = f"\r\x1b[2K{line[:width]}"
            self._stream.write(line + ("\n" if last else ""))
        else:
            self._stream.write(line.rstrip() + "\n")
        self._stream.flush()


@contextlib.contextmanager
def status(title: str) -> Iterator[Status]:
    """Show `title` until the block ends; an exception ends it as failed."""
    line = Status(title)
    line.start()
    try:
        yield line
    except BaseException:
        line.stop("failed")
        raise
    line.stop("done")


def run_logged(
    command: Sequence[str | Path],
    log: Path,
    on_line: Callable[[str], None],
    env: Mapping[str, str] | None = None,
) -> int:
    """Run `command`, append all that it prints to `log`, give each line to `on_line`; its exit code."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        with subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    file.write(line)
                    on_line(line.rstrip())
            except BaseException:
                process.terminate()
                raise
        return process.returncode


def tail(log: Path, lines: int) -> str:
    """The last lines of a log, long compiler commands shortened."""
    with log.open(encoding="utf-8", errors="replace") as file:
        last = file.readlines()[-lines:]
    return "".join(f"  | {line.rstrip()[:200]}\n" for line in last)


def clock(seconds: float) -> str:
    """Minutes and seconds, as `3:07`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
