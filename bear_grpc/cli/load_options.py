"""The options of a load, as `bear load` and `bear estimate` take them."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

import typer

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


class KvCacheTypeName(StrEnum):
    """Number formats of the KV cache."""

    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


def parse_seconds(text: str) -> float:
    """Seconds, or a number with one of s, m, h, d: `300`, `5m`, `-1`. Raises BadParameter."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no time: 300, 5m, 2h")
    return float(match[1]) * _UNITS[match[2]]


def parse_keep_alive(text: str) -> float:
    """A time as above, or `forever`, which is any negative one. Raises BadParameter."""
    return -1.0 if text == "forever" else parse_seconds(text)


ContextLength = Annotated[int | None, typer.Option(help="Most tokens of one sequence.")]
MaxSequences = Annotated[int | None, typer.Option(help="Most sequences that run at a time.")]
KvCacheTokens = Annotated[int | None, typer.Option(help="KV cache in tokens, all sequences.")]
GpuLayers = Annotated[int | None, typer.Option(help="Layers on a GPU; -1 is all.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads of one step.")]
BatchTokens = Annotated[int | None, typer.Option(help="Most tokens of one step.")]
MicroBatchTokens = Annotated[int | None, typer.Option(help="Tokens of one pass of the kernels.")]
KvCacheType = Annotated[KvCacheTypeName | None, typer.Option(help="Number format of the KV cache.")]
FlashAttention = Annotated[bool | None, typer.Option(help="Fused attention kernels.")]
Mmap = Annotated[bool | None, typer.Option(help="Map the weights from the file.")]
Mlock = Annotated[bool | None, typer.Option(help="Lock the weights in memory.")]
Repack = Annotated[bool | None, typer.Option(help="Rearrange the weights for this CPU.")]
KvUnified = Annotated[bool | None, typer.Option(help="One KV pool for all sequences.")]
KeepAlive = Annotated[
    float | None,
    typer.Option(
        metavar="TIME",
        parser=parse_keep_alive,
        help="Unload after this long without use: seconds, 5m, 2h; 0 after use, -1 or forever never.",
    ),
]
Pinned = Annotated[bool | None, typer.Option(help="Keep it when memory is needed for another model.")]
