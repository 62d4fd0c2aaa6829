"""What is written down of a file under way, so that a later run can go on from there."""

from __future__ import annotations

import logging

import msgspec

from .blobs import Blobs

log = logging.getLogger(__name__)

MAX_SEGMENT_BYTES = 32 * 2**20
MIN_SEGMENT_BYTES = 2**18
SEGMENTS = 64  # of a file of middle size: then little is left to be hashed at the end


class SegmentState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first `count` bytes of a segment are there; `crc32` is theirs as they were received."""

    index: int
    count: int
    crc32: int


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is there of a file, and where it has come from."""

    repo_id: str
    file: str
    size_bytes: int
    segment_bytes: int
    segments: list[SegmentState]

    @property
    def present_bytes(self) -> int:
        """Bytes that are there."""
        return sum(segment.count for segment in self.segments)

    def fits(self, size_bytes: int) -> bool:
        """Whether it can be of a file of this size."""
        if self.size_bytes != size_bytes or self.segment_bytes < MIN_SEGMENT_BYTES:
            return False
        count = -(-size_bytes // self.segment_bytes)
        indices = [segment.index for segment in self.segments]
        return len(set(indices)) == len(indices) and all(
            0 <= segment.index < count
            and 0 < segment.count <= min(self.segment_bytes, size_bytes - segment.index * self.segment_bytes)
            for segment in self.segments
        )


def segment_bytes_of(size_bytes: int) -> int:
    """How a file is divided: into segments of a power of two bytes, some dozens where that is sensible."""
    wanted = 1 << (max(1, size_bytes // SEGMENTS) - 1).bit_length()
    return min(max(wanted, MIN_SEGMENT_BYTES), MAX_SEGMENT_BYTES)


def read_state(blobs: Blobs, sha256: str) -> State | None:
    """What is said to be there of a file under way; None: nothing. Needs no lock."""
    file = blobs.state(sha256)
    try:
        return msgspec.json.decode(file.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as exc:
        log.warning("%s is left out: %s", file, exc)
        return None
