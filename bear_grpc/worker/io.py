"""The I/O thread: frames in and out of the socket, whatever the owner is doing."""

from __future__ import annotations

import collections
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable

from ..framing import FrameBuffer, encode
from ..protocol import Frame, ToWorker

RECEIVE_BYTES = 256 * 1024


class Connection:
    """The worker's end of the socket pair. `post` from any thread, `run` on one.

    The outbox is bounded by what may be under way: each stream by its credit,
    each text job by one answer.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._lock = threading.Lock()
        self._outbox: collections.deque[Frame] = collections.deque()
        self._unsent = b""
        self._signalled = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._buffer = FrameBuffer(to_worker=True)
        self._closing = False

    def post(self, frame: Frame) -> None:
        """Any thread: sends a frame soon. Never blocks on the socket."""
        with self._lock:
            self._outbox.append(frame)
            signal, self._signalled = not self._signalled, True
        if signal:
            os.write(self._wake_write, b"\x00")

    def close_after_sending(self) -> None:
        """Any thread: `run` returns when everything posted before has been sent."""
        with self._lock:
            self._closing = True
            self._signalled = True
        os.write(self._wake_write, b"\x00")

    def run(self, on_frame: Callable[[ToWorker], None], on_tick: Callable[[], None], tick_s: float) -> None:
        """Serves the socket until the other end closes it; `on_tick` runs about every `tick_s`.

        Raises FrameError when the other end sends what is no frame.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            wanted = selectors.EVENT_READ
            next_tick = time.monotonic() + tick_s
            while True:
                ready = selector.select(max(0.0, next_tick - time.monotonic()))
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + tick_s
                    on_tick()
                for key, _ in ready:
                    if key.fileobj is self._sock and not self._receive(on_frame):
                        return
                self._send()
                if self._closing and not self._unsent and not self._outbox:
                    return
                now_wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
                if now_wanted != wanted:
                    selector.modify(self._sock, now_wanted)
                    wanted = now_wanted

    def _receive(self, on_frame: Callable[[ToWorker], None]) -> bool:
        """Reads what is there; False at the end of the stream."""
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        for frame in self._buffer.feed(data):
            on_frame(frame)  # type: ignore[arg-type]  # the buffer decodes ToWorker only
        return bool(data)

    def _send(self) -> None:
        with self._lock:
            frames = list(self._outbox)
            self._outbox.clear()
            if self._signalled:
                self._signalled = False
                self._drain_wake()
        data = self._unsent + b"".join(encode(frame) for frame in frames)
        if not data:
            return
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            sent = len(data)  # the read side sees the end of the stream and stops
        self._unsent = data[sent:]

    def _drain_wake(self) -> None:
        try:
            os.read(self._wake_read, 64)
        except BlockingIOError:
            return
