"""How far two lists of tokens begin alike."""

from __future__ import annotations


def common_length(one: list[int], other: list[int], most: int) -> int:
    """How many tokens both begin with, up to `most`."""
    high = min(len(one), len(other), most)
    if one[:high] == other[:high]:
        return high
    low = 0
    # Comparing slices is faster than a loop; equal up to `low`, different within `high`.
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
