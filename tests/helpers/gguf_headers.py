"""What is asked of any header, be its file honest or not, and files that are bytes only."""

from __future__ import annotations

from bear_grpc.models.gguf import GgufHeader


class BytesSource:
    """A file elsewhere: its bytes, and which of them were asked for. `hidden` bytes more are all zero."""

    def __init__(self, data: bytes, hidden: int = 0) -> None:
        self.data = data
        self.size = len(data) + hidden
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, count: int) -> bytes:
        self.reads.append((offset, count))
        return self.data[offset : offset + count].ljust(min(count, self.size - offset), b"\0")


def properties_of(header: GgufHeader) -> dict[str, object]:
    """Every public property by its name."""
    names = [name for name, member in vars(GgufHeader).items() if isinstance(member, property)]
    return {name: getattr(header, name) for name in names if not name.startswith("_")}
