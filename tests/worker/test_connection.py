"""The worker's end of the socket: frames both ways, ticks, and the end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from bear_grpc.framing import FrameBuffer, FrameError, encode
from bear_grpc.protocol import Cancel, Frame, Heartbeat, TextJob, TextResult
from bear_grpc.worker.io import Connection

WAIT_S = 20
NEVER_S = 1000.0


class Bench:
    """A connection that runs in a thread, and the server's end of its socket."""

    def __init__(self) -> None:
        self.peer, theirs = socket.socketpair()
        self.peer.settimeout(WAIT_S)
        # Small: big frames do not fit and must be sent in parts.
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.theirs = theirs
        self.connection = Connection(theirs)
        self.frames: list[Frame] = []
        self.ticks = 0
        self.error: BaseException | None = None
        self.on_frame: Callable[[Frame], None] = lambda frame: None
        self._buffer = FrameBuffer(to_worker=False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.tick_s = NEVER_S

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            self.connection.run(self._take, self._tick, self.tick_s)
        except BaseException as exc:
            self.error = exc

    def _take(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.on_frame(frame)

    def _tick(self) -> None:
        self.ticks += 1

    def join(self) -> bool:
        """Whether the connection's run has returned."""
        self._thread.join(WAIT_S)
        return not self._thread.is_alive()

    def receive(self, count: int) -> list[Frame]:
        found: list[Frame] = []
        while len(found) < count:
            data = self.peer.recv(65536)
            assert data, "the connection has closed"
            found += self._buffer.feed(data)
        return found


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.peer.close()
    if made._thread.ident is not None:
        assert made.join()
    made.theirs.close()


def test_frames_posted_before_the_run_arrive_in_order(bench):
    sent = [Heartbeat(step, 0.0) for step in range(100)]
    for frame in sent:
        bench.connection.post(frame)
    bench.start()
    assert bench.receive(100) == sent


def test_frames_posted_together_go_out_in_one_write(bench):
    sent = [Heartbeat(step, 0.0) for step in range(20)]
    for frame in sent:
        bench.connection.post(frame)
    bench.start()
    size = sum(len(encode(frame)) for frame in sent)
    bench.peer.settimeout(WAIT_S)
    # One write to a stream socket of this machine is there as a whole, once any of it is.
    assert len(bench.peer.recv(65536)) == size


def test_frames_from_many_threads_all_arrive(bench):
    bench.start()

    def post(first: int) -> None:
        for step in range(first, first + 50):
            bench.connection.post(Heartbeat(step, 0.0))

    threads = [threading.Thread(target=post, args=(first,)) for first in range(0, 200, 50)]
    for thread in threads:
        thread.start()
    found = [frame.step for frame in bench.receive(200)]
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(found) == list(range(200))
    assert all(
        [step for step in found if step // 50 == lot] == list(range(lot * 50, lot * 50 + 50))
        for lot in range(4)
    )


def test_frame_bigger_than_the_socket_arrives_whole_and_those_after_it_follow(bench):
    big = TextResult(1, raw=bytes(range(256)) * 2**13)
    bench.connection.post(big)
    bench.connection.post(Heartbeat(7, 0.0))
    bench.start()
    assert bench.receive(2) == [big, Heartbeat(7, 0.0)]


def test_frames_in_arrive_while_a_big_one_waits_to_go_out(bench):
    """A reader that is slow must not keep its own cancel from being seen."""
    seen = threading.Event()
    bench.on_frame = lambda frame: seen.set()
    bench.connection.post(TextResult(1, raw=bytes(2**22)))
    bench.start()
    bench.peer.sendall(encode(Cancel(5)))
    assert seen.wait(WAIT_S)
    assert bench.frames == [Cancel(5)]
    bench.receive(1)


def test_frame_in_bigger_than_one_read_arrives_whole(bench):
    seen = threading.Event()
    bench.on_frame = lambda frame: seen.set()
    bench.start()
    big = TextJob(1, token_ids=list(range(300_000)))
    bench.peer.sendall(encode(big))
    assert seen.wait(WAIT_S)
    assert bench.frames == [big]


def test_answer_posted_inside_on_frame_goes_out(bench):
    bench.on_frame = lambda frame: bench.connection.post(Heartbeat(frame.id, 0.0))
    bench.start()
    bench.peer.sendall(encode(Cancel(1)) + encode(Cancel(2)))
    assert bench.receive(2) == [Heartbeat(1, 0.0), Heartbeat(2, 0.0)]


def test_end_of_the_stream_ends_the_run(bench):
    bench.start()
    bench.peer.sendall(encode(Cancel(1)))
    bench.peer.close()
    assert bench.join()
    assert bench.error is None


def test_end_of_the_stream_with_frames_unsent_ends_the_run(bench):
    bench.connection.post(TextResult(1, raw=bytes(2**22)))
    bench.start()
    bench.peer.recv(1)
    bench.peer.close()
    assert bench.join()
    assert bench.error is None


def test_end_of_the_stream_inside_a_frame_ends_the_run(bench):
    bench.start()
    bench.peer.sendall(encode(Cancel(1))[:-1])
    bench.peer.close()
    assert bench.join()
    assert (bench.error, bench.frames) == (None, [])


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1"], ids=["length", "body"])
def test_what_is_no_frame_ends_the_run_with_frame_error(bench, data):
    bench.start()
    bench.peer.sendall(data)
    assert bench.join()
    assert isinstance(bench.error, FrameError)


def test_close_after_sending_sends_all_and_ends_the_run(bench):
    big = TextResult(1, raw=bytes(2**21))
    bench.start()
    bench.connection.post(big)
    bench.connection.post(Heartbeat(1, 0.0))
    bench.connection.close_after_sending()
    assert bench.receive(2) == [big, Heartbeat(1, 0.0)]
    assert bench.join()
    assert bench.error is None


def test_tick_comes_without_any_traffic(bench):
    ticked = threading.Event()
    bench._tick = ticked.set
    bench.tick_s = 0.001
    bench.start()
    assert ticked.wait(WAIT_S)


def test_tick_comes_under_traffic_without_a_pause(bench):
    """Heartbeats and the time limit of text jobs hang on it: a busy worker needs them most."""
    done = threading.Event()

    def again(frame: Frame) -> None:
        # The next frame is there before the connection looks again: it is never idle.
        if frame.id < 50:
            bench.peer.sendall(encode(Cancel(frame.id + 1)))
        else:
            ticks.append(bench.ticks)
            done.set()

    ticks: list[int] = []
    bench.on_frame = again
    bench.tick_s = 0.0
    bench.peer.sendall(encode(Cancel(1)))
    bench.start()
    assert done.wait(WAIT_S)
    assert ticks[0] >= 49
