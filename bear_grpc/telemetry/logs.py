"""The server's log: a bounded queue, and a thread that writes it to stderr and to a file.

Nobody who logs waits for a disk or a terminal: what finds the queue full is dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from ..config import ServerConfig
from .log_file import LogFile
from .log_format import as_json, as_text

log = logging.getLogger(__name__)

MAX_QUEUED = 10_000
FILE = "logs/bear.log"
# What is still to be written at the end gets so long.
CLOSE_S = 3.0
# A file that could not be written is tried again after so long.
RETRY_S = 5.0
Format = Callable[[logging.LogRecord], str]


class LogQueue(logging.Handler):
    """Puts records into the queue; any thread."""

    def __init__(self, max_queued: int = MAX_QUEUED) -> None:
        super().__init__()
        self.queue: queue.Queue[logging.LogRecord | None] = queue.Queue(max_queued)
        self.dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Never blocks."""
        try:
            # Here: what it is made of may change.
            record.msg, record.args = record.getMessage(), None
            if record.exc_info and not record.exc_text:
                record.exc_text = logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        except Exception:
            self.handleError(record)
            return
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class LogWriter(threading.Thread):
    """Writes what comes into the queue until it is closed."""

    def __init__(
        self,
        source: LogQueue,
        stream: TextIO,
        format: Format,
        file: LogFile | None = None,
        file_format: Format = as_json,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name="log", daemon=True)
        self._source = source
        self._stream = stream
        self._format = format
        self._file = file
        self._file_format = file_format
        self._clock = clock
        self._told_dropped = 0
        self._retry_s: float | None = None  # when a file that has failed is tried again
        self._has_warned = False

    def run(self) -> None:
        while (record := self._source.queue.get()) is not None:
            try:
                self.write(record)
            except Exception as exc:  # of what it holds; the next one must not be lost with it
                self._to_stream(_warning(f"a line of {record.name} cannot be written: {exc!r}"))
            if self._source.dropped > self._told_dropped:
                lost, self._told_dropped = self._source.dropped - self._told_dropped, self._source.dropped
                self.write(_warning(f"{lost} log lines were dropped: more came than could be written"))
        if self._file is not None:
            self._file.close()

    def write(self, record: logging.LogRecord) -> None:
        """To stderr and to the file; what fails there hurts nobody."""
        self._to_stream(record)
        if self._file is None or (self._retry_s is not None and self._clock() < self._retry_s):
            return
        try:
            self._file.write(self._file_format(record))
        except OSError as exc:
            self._retry_s = self._clock() + RETRY_S
            if not self._has_warned:
                self._has_warned = True
                why = exc.strerror or exc
                self._to_stream(_warning(f"{self._file.path} cannot be written, lines are lost there: {why}"))
        else:
            self._retry_s, self._has_warned = None, False

    def _to_stream(self, record: logging.LogRecord) -> None:
        try:
            self._stream.write(self._format(record) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass  # nobody is there to read it


class Logs:
    """The log of this process while it serves: `open`, then `close`."""

    def __init__(self, config: ServerConfig, stream: TextIO | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        is_text = config.log_format == "text" or (config.log_format == "auto" and stream.isatty())
        self._level = config.log_level
        self._queue = LogQueue()
        self.file: LogFile | None = None
        if config.log_file:
            path, size = config.state_dir / FILE, round(config.log_file_mb * 1e6)
            self.file = LogFile(path, size, config.log_file_count)
        file_format = as_text if config.log_format == "text" else as_json
        self._writer = LogWriter(self._queue, stream, as_text if is_text else as_json, self.file, file_format)

    def open(self) -> None:
        """Takes the root logger."""
        root = logging.getLogger()
        root.setLevel(self._level)
        root.addHandler(self._queue)
        self._writer.start()
        if self.file is not None:
            log.debug("the log is kept in %s", self.file.path)

    def close(self) -> None:
        """Writes what is left, for CLOSE_S at most."""
        logging.getLogger().removeHandler(self._queue)
        try:
            self._queue.queue.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._writer.join(CLOSE_S)


def dropped_lines() -> int:
    """Lines that this process has dropped."""
    return sum(each.dropped for each in logging.getLogger().handlers if isinstance(each, LogQueue))


def _warning(message: str) -> logging.LogRecord:
    return logging.LogRecord(__name__, logging.WARNING, "", 0, message, None, None)
