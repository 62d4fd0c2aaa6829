"""docs/troubleshooting.md as data: its entries, and whether a message is one that it shows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"

# Words of the examples that stand for others.
_WORDS = (
    *("owner/repo", "tiny.Q4_K_M.gguf", "huggingface.co", "phi-2", "bear-dmo", "engx2w4zuk", "5f0c2a"),
    *("bear.toml", "lisen"),
)
# What an example may stand for, by how it is written: a name in quotes, a path, a number, anything.
_STANDS_FOR = (
    ("|".join(map(re.escape, _WORDS)), r"\S+"),
    (r"'[^']*'", r"'[^']*'"),
    (r"(?<![\w.])/[\w./-]+", r"/\S+"),
    (r"\d+(?:\.\d+)?", r"\d+(?:\.\d+)?"),
    ("…", r".*"),
)
_PLACES = re.compile("|".join(f"({written})" for written, _ in _STANDS_FOR))
_HEADING = re.compile(r"^(##+) (.+)$", re.MULTILINE)
_HEAD = re.compile(r"`([A-Z_]+)`(?:, with `\w+`)?\. (Retry: .+)")
_EXAMPLES = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """A heading of the third level with what is below it; `section` is the one of the second level."""

    title: str
    section: str
    text: str

    @property
    def code(self) -> str:
        """The gRPC code that it tells; of a reason only."""
        return self._head[1]

    @property
    def retry(self) -> str:
        """What it says of sending the call again; of a reason only."""
        return self._head[2]

    @property
    def examples(self) -> list[str]:
        """The messages that it shows."""
        return [line for block in _EXAMPLES.findall(self.text) for line in block.splitlines()]

    @property
    def _head(self) -> re.Match[str]:
        found = _HEAD.fullmatch(self.text.splitlines()[0])
        assert found is not None, f"{self.title} does not begin with a code and a retry"
        return found


def shows(example: str, message: str) -> bool:
    """Whether the example is such a message: names, paths and numbers may be others."""
    pattern, end = "", 0
    for place in _PLACES.finditer(example):
        assert place.lastindex is not None
        pattern += re.escape(example[end : place.start()]) + _STANDS_FOR[place.lastindex - 1][1]
        end = place.end()
    return re.fullmatch(pattern + re.escape(example[end:]), message, re.DOTALL) is not None


def _read() -> list[Entry]:
    found, section = [], ""
    text = PAGE.read_text(encoding="utf-8")
    headings = list(_HEADING.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    for heading, end in zip(headings, ends, strict=True):
        level, title = heading.groups()
        if level == "##":
            section = title
        else:
            found.append(Entry(title, section, text[heading.end() : end].strip()))
    return found


ENTRIES = _read()
"""All of them, in their order."""

REASONS = {entry.title: entry for entry in ENTRIES if re.fullmatch("[A-Z_]+", entry.title)}
SYMPTOMS = {entry.title: entry for entry in ENTRIES if entry.title not in REASONS}
