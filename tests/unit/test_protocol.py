"""Frames: what is sent is what arrives, however it is cut; what is no frame is refused."""

from __future__ import annotations

import struct
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc import protocol
from bear_grpc.framing import MAX_FRAME_BYTES, FrameBuffer, FrameError, encode
from bear_grpc.protocol import Cancel, Credit, Delta, Frame, Heartbeat, Share, Step, Stop, TextResult, Token
from tests.helpers.structs import values_of

TO_WORKER = typing.get_args(protocol.ToWorker)
TO_SERVER = typing.get_args(protocol.ToServer)


# Where a value may be anything, it may also be a list in a list in a list …
CHAT = {"type": "chat", "messages": [], "template_kwargs": {"x": msgspec.Raw(b"\x91" * 100_000 + b"\xc0")}}
NESTED = msgspec.msgpack.encode({"type": "TextJob", "id": 1, "input": CHAT})


def read(data: bytes, *, to_worker: bool = False) -> list[Frame]:
    return list(FrameBuffer(to_worker=to_worker).feed(data))


def raw(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def test_frames_every_class_goes_one_way():
    found = {kind for kind in vars(protocol).values() if isinstance(kind, type) and issubclass(kind, Frame)}
    assert found - {Frame} == {*TO_WORKER, *TO_SERVER}
    assert not {*TO_WORKER} & {*TO_SERVER}


@pytest.mark.parametrize("kind", [*TO_WORKER, *TO_SERVER], ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_frame_round_trip_gives_an_equal_frame(kind, data):
    frame = data.draw(values_of(kind))
    assert read(encode(frame), to_worker=kind in TO_WORKER) == [frame]


def test_buffer_cut_at_every_byte_gives_the_same_frames():
    frames = [Cancel(1), Credit(2, 3), Stop(), Share(2)]
    data = b"".join(map(encode, frames))
    for cut in range(len(data) + 1):
        buffer = FrameBuffer(to_worker=True)
        assert [*buffer.feed(data[:cut]), *buffer.feed(data[cut:])] == frames


def test_buffer_fed_byte_by_byte_gives_each_frame_with_its_last_byte():
    data = encode(Cancel(7))
    buffer = FrameBuffer(to_worker=True)
    assert [list(buffer.feed(bytes([byte]))) for byte in data] == [[]] * (len(data) - 1) + [[Cancel(7)]]


def test_buffer_iteration_left_early_keeps_the_later_frames():
    buffer = FrameBuffer(to_worker=True)
    frames = buffer.feed(encode(Cancel(1)) + encode(Cancel(2)))
    assert next(frames) == Cancel(1)
    frames.close()
    assert list(buffer.feed(b"")) == [Cancel(2)]


def test_buffer_length_over_the_limit_is_refused_before_the_body_comes():
    with pytest.raises(FrameError, match=str(MAX_FRAME_BYTES)):
        read(struct.pack("<I", MAX_FRAME_BYTES + 1))


def test_encode_over_the_limit_is_refused():
    with pytest.raises(FrameError, match=str(MAX_FRAME_BYTES)):
        encode(TextResult(1, raw=bytes(MAX_FRAME_BYTES)))


def test_encode_at_the_limit_arrives_whole():
    overhead = len(encode(TextResult(1, raw=bytes(2**20)))) - 4 - 2**20
    frame = TextResult(1, raw=bytes(MAX_FRAME_BYTES - overhead))
    data = encode(frame)
    assert len(data) == 4 + MAX_FRAME_BYTES
    assert read(data) == [frame]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1", id="a byte that msgpack has not"),
        pytest.param(msgspec.msgpack.encode([1, 2]), id="an array"),
        pytest.param(msgspec.msgpack.encode({"id": 1}), id="no tag"),
        pytest.param(msgspec.msgpack.encode({"type": "Nothing"}), id="unknown tag"),
        pytest.param(msgspec.msgpack.encode({"type": "Cancel"}), id="field missing"),
        pytest.param(msgspec.msgpack.encode({"type": "Cancel", "id": "1"}), id="wrong type"),
        pytest.param(encode(Cancel(1))[4:] + b"\x00", id="bytes after the end"),
        pytest.param(encode(Cancel(1))[4:-1], id="cut short"),
        pytest.param(encode(Heartbeat(1, 0.0))[4:], id="the other direction"),
        pytest.param(NESTED, id="nested without end"),
    ],
)
def test_buffer_body_that_is_no_frame_is_refused(body):
    with pytest.raises(FrameError):
        read(raw(body), to_worker=True)


@given(body=st.binary(max_size=64), to_worker=st.booleans())
def test_buffer_random_body_gives_a_frame_or_frame_error(body, to_worker):
    try:
        frames = read(raw(body), to_worker=to_worker)
    except FrameError:
        return
    assert all(isinstance(frame, Frame) for frame in frames)


def test_buffer_frames_before_a_bad_one_are_given_first():
    frames = FrameBuffer(to_worker=True).feed(encode(Cancel(1)) + raw(b"\xc1"))
    assert next(frames) == Cancel(1)
    with pytest.raises(FrameError):
        next(frames)


def test_step_bytes_of_a_token_that_are_no_text_arrive():
    frame = Step([Delta(1, "", 1, [Token(5, b"\xff\xe2")])])
    assert read(encode(frame)) == [frame]
