"""A file under way: which of its bytes are there, and what they were when they came."""

from __future__ import annotations

import logging
import os
import threading
import zlib
from collections.abc import Callable, Sequence

import msgspec

from .blobs import Blobs
from .listing import HubFile
from .state import SegmentState, State, read_state, segment_bytes_of

log = logging.getLogger(__name__)

READ_BYTES = 2**20


class Ended(Exception):
    """The download ends before the file is whole; for its own threads only."""


class Partial:
    """One file under way, its lock held. Any thread; each segment is written by one at a time.

    Bytes reach the file before the state tells of them. After a loss of power that may
    not hold; the checksum finds it out, and then the CRCs tell which segments to fetch again.
    """

    def __init__(self, blobs: Blobs, repo_id: str, file: HubFile) -> None:
        """Goes on from what is there, or begins. Raises OSError."""
        self._blobs, self._repo_id, self._file = blobs, repo_id, file
        self.size_bytes = file.size_bytes
        self.ending = threading.Event()
        self._changed = threading.Condition()
        self._saving = threading.Lock()
        self._frontier_index = 0
        state = self._usable_state()
        self.segment_bytes = segment_bytes_of(file.size_bytes) if state is None else state.segment_bytes
        self._counts = [0] * -(-file.size_bytes // self.segment_bytes)
        self._crcs = [0] * len(self._counts)
        self._kept: set[int] = set()
        self.handle = self._open(fresh=state is None)
        if state is not None:
            for segment in state.segments:
                self._counts[segment.index], self._crcs[segment.index] = segment.count, segment.crc32
                self._kept.add(segment.index)

    def close(self) -> None:
        """Writes down what is there, unless it has become a blob or was put aside, and closes the file."""
        try:
            if self._blobs.part(self._file.sha256).exists():
                self.save()
        except OSError as exc:
            # What was written down before stays true.
            log.warning("the last bytes of %s have to be fetched again: %s", self._file.file, exc)
        finally:
            os.close(self.handle)

    @property
    def present_bytes(self) -> int:
        """Bytes that are there."""
        with self._changed:
            return sum(self._counts)

    def missing(self) -> list[int]:
        """Segments that are not whole, in order."""
        with self._changed:
            return [index for index, count in enumerate(self._counts) if count < self._length(index)]

    def extent(self, index: int) -> tuple[int, int]:
        """The bytes of a segment that are missing: from, to."""
        with self._changed:
            begin = index * self.segment_bytes
            return begin + self._counts[index], begin + self._length(index)

    def append(self, index: int, pieces: Sequence[bytes | memoryview]) -> None:
        """Writes the next bytes of a segment. Raises OSError."""
        offset, stop = self.extent(index)
        crc, count = self._crcs[index], 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            count += len(piece)
        assert count <= stop - offset
        _write(self.handle, pieces, count, offset)
        with self._changed:
            self._counts[index] += count
            self._crcs[index] = crc
            self._changed.notify_all()
        if offset + count == stop:
            self.save()

    def wait_beyond(self, position: int) -> int:
        """Waits for bytes after `position`; up to where they are there without a gap. Raises Ended."""
        with self._changed:
            while (frontier := self._frontier()) <= position:
                if self.ending.is_set():
                    raise Ended
                self._changed.wait()
            return frontier

    def end(self) -> None:
        """Has all threads that work on the file stop soon."""
        with self._changed:
            self.ending.set()
            self._changed.notify_all()

    def resume(self) -> None:
        """Takes `end` back, once all threads have stopped."""
        self.ending.clear()

    def save(self) -> None:
        """Writes down what is there. Raises OSError."""
        with self._saving:
            with self._changed:
                segments = [
                    SegmentState(index, count, crc)
                    for index, (count, crc) in enumerate(zip(self._counts, self._crcs, strict=True))
                    if count
                ]
            state = State(self._repo_id, self._file.file, self.size_bytes, self.segment_bytes, segments)
            new = self._blobs.new_state(self._file.sha256)
            # Not synced: too slow for every segment, and what it says is verified in any case.
            new.write_bytes(msgspec.json.encode(state))
            new.replace(self._blobs.state(self._file.sha256))

    def sync(self) -> None:
        """Has the bytes that are there on the disk. Raises OSError."""
        os.fsync(self.handle)

    def drop_changed(self, check: Callable[[], None]) -> int:
        """Forgets the segments that are not on the disk as they were received; how many.

        `check` is called often, and may raise to stop it.
        """
        indices = range(len(self._counts))
        changed = [index for index in indices if self._read_crc(index, check) != self._crcs[index]]
        return self._drop(changed, "is not on the disk as it was received")

    def drop_kept(self, check: Callable[[], None]) -> int:
        """Forgets the segments that have come, or begun to come, in an earlier run; how many."""
        check()
        return self._drop(sorted(self._kept), "was received in an earlier run, and the file is wrong")

    def _drop(self, indices: Sequence[int], why: str) -> int:
        for index in indices:
            log.warning("segment %d of %s %s; it is fetched again", index, self._file.file, why)
            self._kept.discard(index)
            self._counts[index] = self._crcs[index] = 0
        self._frontier_index = 0
        if indices:
            self.save()
        return len(indices)

    def _read_crc(self, index: int, check: Callable[[], None]) -> int:
        offset = index * self.segment_bytes
        stop, crc = offset + self._counts[index], 0
        while offset < stop:
            check()
            data = os.pread(self.handle, min(READ_BYTES, stop - offset), offset)
            if not data:
                break
            crc = zlib.crc32(data, crc)
            offset += len(data)
        return crc

    def _length(self, index: int) -> int:
        return min(self.segment_bytes, self.size_bytes - index * self.segment_bytes)

    def _frontier(self) -> int:
        """The end of the bytes that are there without a gap from the beginning."""
        last = len(self._counts) - 1
        while self._frontier_index < last and self._counts[self._frontier_index] == self.segment_bytes:
            self._frontier_index += 1
        return self._frontier_index * self.segment_bytes + self._counts[self._frontier_index]

    def _open(self, *, fresh: bool) -> int:
        part = self._blobs.part(self._file.sha256)
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.exists():
            part.chmod(0o644)  # it may have been about to become a blob
        handle = os.open(part, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o644)
        try:
            os.ftruncate(handle, self.size_bytes)
        except BaseException:
            os.close(handle)
            raise
        return handle

    def _usable_state(self) -> State | None:
        """What an earlier run has left, if it fits the file."""
        state = read_state(self._blobs, self._file.sha256)
        if state is None:
            return None
        part = self._blobs.part(self._file.sha256)
        if not part.exists() or part.stat().st_size != self.size_bytes or not state.fits(self.size_bytes):
            log.warning("what is there of %s does not fit it; it is fetched anew", self._file.file)
            return None
        return state


def _write(handle: int, pieces: Sequence[bytes | memoryview], count: int, offset: int) -> None:
    written = os.pwritev(handle, pieces, offset)
    if written < count:  # a nearly full disk: the next call tells
        rest = memoryview(b"".join(pieces))[written:]
        while rest:
            done = os.pwrite(handle, rest, offset + written)
            written, rest = written + done, rest[done:]
