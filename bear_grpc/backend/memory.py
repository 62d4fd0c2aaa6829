"""The KV cache of a llama.cpp context: lengths, removal, copies, snapshots.

Every call checks its sequence id: llama.cpp would end the process. Nor is it asked
for what it would answer with silently wrong output (see `_is_whole_until`).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import KvTraits
from .native import lib


class LlamaMemory:
    """See the `kv_` methods of `backend.base.Backend`. Owner thread only."""

    def __init__(self, context: Any, traits: KvTraits, sliding_window: int) -> None:
        """`sliding_window` is how many tokens a model with such layers looks back; 0 without."""
        self._window = sliding_window
        self._context = context
        self._memory = lib.llama_get_memory(context)
        self._traits = traits

    def length(self, sequence_id: int) -> int:
        self._check(sequence_id)
        return int(lib.llama_memory_seq_pos_max(self._memory, sequence_id)) + 1

    def remove(self, sequence_id: int, start: int) -> bool:
        self._check(sequence_id)
        if start <= 0:
            return bool(lib.llama_memory_seq_rm(self._memory, sequence_id, -1, -1))
        if not self._is_whole_until(sequence_id, start):
            return False
        return bool(lib.llama_memory_seq_rm(self._memory, sequence_id, start, -1))

    def copy(self, source: int, target: int, length: int) -> bool:
        held = self.length(source)
        self._check(target)
        if length > held or (length < held and not self._traits.can_cut):
            return False
        if self._traits.unified:
            if not self._is_whole_until(source, length):
                return False
            lib.llama_memory_seq_cp(self._memory, source, target, 0, length)
            return True
        # Between streams llama.cpp's copy aborts the process for a part, and waits for the next step
        # with a whole: a snapshot does neither. It holds no more than the window, so it must not be cut.
        if length < held and self._window:
            return False
        return self._restore(target, self._save(source)) and self.remove(target, length)

    def clear(self) -> None:
        lib.llama_memory_clear(self._memory, True)

    def save(self, sequence_id: int) -> bytes:
        return self._save(sequence_id).tobytes()

    def restore(self, sequence_id: int, data: bytes) -> bool:
        return self._restore(sequence_id, np.frombuffer(data, np.uint8))

    def _save(self, sequence_id: int) -> NDArray[np.uint8]:
        if self.length(sequence_id) == 0:
            return np.empty(0, np.uint8)
        size = lib.llama_state_seq_get_size_ext(self._context, sequence_id, 0)
        data = np.empty(size, np.uint8)
        written = lib.llama_state_seq_get_data_ext(self._context, _address(data), size, sequence_id, 0)
        return data[:written]

    def _restore(self, sequence_id: int, data: NDArray[np.uint8]) -> bool:
        self._check(sequence_id)
        if not data.size:
            return True
        read = lib.llama_state_seq_set_data_ext(self._context, _address(data), data.size, sequence_id, 0)
        return int(read) > 0

    def _is_whole_until(self, sequence_id: int, position: int) -> bool:
        """Whether a sequence can go on from `position`: after a snapshot only its last window is there."""
        if not self._window or position >= self.length(sequence_id):
            return True
        first = int(lib.llama_memory_seq_pos_min(self._memory, sequence_id))
        return first <= max(0, position - self._window + 1)

    def _check(self, sequence_id: int) -> None:
        if not 0 <= sequence_id < self._traits.sequence_ids:
            raise IndexError(f"sequence id {sequence_id} of {self._traits.sequence_ids}")


def _address(data: NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
