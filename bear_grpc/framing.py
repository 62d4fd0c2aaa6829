"""How frames lie on the socket between the server and a worker.

A frame is a 4-byte little-endian length and a msgpack struct whose tag names
it. Both ends treat the other's frames as untrusted input: lengths are bounded,
types are checked, and a frame that does not decode ends the connection.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import msgspec

from .protocol import Frame, ToServer, ToWorker

MAX_FRAME_BYTES = 8 * 2**20
_LENGTH = struct.Struct("<I")

_encoder = msgspec.msgpack.Encoder()
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_to_server = msgspec.msgpack.Decoder(ToServer)


class FrameError(Exception):
    """The other end sent something that is no frame."""


def encode(frame: Frame) -> bytes:
    """The frame as it goes over the socket. Raises FrameError over MAX_FRAME_BYTES."""
    body = _encoder.encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes is over {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


def read_first(sock: socket.socket) -> ToWorker | None:
    """Worker: the first frame of a blocking socket, and not a byte after it; None if the server closes it.

    Raises FrameError for what is no frame.
    """
    head = _read_exactly(sock, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes is over {MAX_FRAME_BYTES}")
    body = _read_exactly(sock, length)
    if body is None:
        return None
    try:
        frame: ToWorker = _to_worker.decode(body)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise FrameError(str(exc)) from exc
    return frame


def _read_exactly(sock: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


class FrameBuffer:
    """Cuts received bytes into frames; holds at most one frame that is not complete."""

    def __init__(self, *, to_worker: bool) -> None:
        self._decode = (_to_worker if to_worker else _to_server).decode
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[ToWorker | ToServer]:
        """Frames completed by `data`, in order. Raises FrameError for what is no frame."""
        self._bytes += data
        start = 0
        try:
            while len(self._bytes) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._bytes, start)
                if length > MAX_FRAME_BYTES:
                    raise FrameError(f"a frame of {length} bytes is over {MAX_FRAME_BYTES}")
                end = start + _LENGTH.size + length
                if len(self._bytes) < end:
                    break
                body = self._bytes[start + _LENGTH.size : end]
                start = end
                try:
                    frame = self._decode(body)
                except (msgspec.MsgspecError, RecursionError) as exc:
                    raise FrameError(str(exc)) from exc
                yield frame
        finally:
            del self._bytes[:start]
