"""llama.cpp's library as one name. The only importer of llama_cpp.

Log, versions and devices are here; what a model can do is in the other modules.
"""

from __future__ import annotations

import atexit
import collections
import ctypes
import logging
import os
from importlib.metadata import version
from typing import Any

import llama_cpp.llama_cpp

from .. import host
from ..protocol import LEVEL_MARKS, DeviceInfo

# Most of the binding carries no usable annotations.
lib: Any = llama_cpp.llama_cpp

_LOG_INFO, _LOG_WARN, _LOG_ERROR, _LOG_CONT = 2, 3, 4, 5
# What llama.cpp tells of every load is for who looks closely.
_MARKS = {
    _LOG_INFO: LEVEL_MARKS[logging.DEBUG].encode(),
    _LOG_WARN: LEVEL_MARKS[logging.WARNING].encode(),
    _LOG_ERROR: LEVEL_MARKS[logging.ERROR].encode(),
}
# The pool of all sequences may be longer than the model's context; each of them may not.
_EXPECTED = b"possible training context overflow"
_DEVICE_KINDS = {0: "cpu", 1: "gpu", 2: "igpu", 3: "accel"}


class NativeLog:
    """Passes llama.cpp's lines to stderr with their levels, and keeps the last errors."""

    def __init__(self) -> None:
        self.errors: collections.deque[str] = collections.deque(maxlen=20)
        self._level = _LOG_ERROR
        self._is_new_line = True
        # Texts of every level while somebody collects them.
        self.lines: list[str] | None = None
        # While a computation is being aborted on purpose, its failure is no news.
        self.is_aborting = False
        # The callback object must live as long as the process.
        self._callback = lib.llama_log_callback(self._take)

    def install(self) -> None:
        lib.llama_log_set(self._callback, None)
        # llama.cpp may still have something to say when the interpreter is gone.
        atexit.register(lib.llama_log_set, lib.llama_log_callback(0), None)

    def _take(self, level: int, text: bytes, _data: object) -> None:
        self._level = level if level != _LOG_CONT else self._level
        if self.lines is not None:
            self.lines.append(text.decode(errors="replace").strip())
        if _EXPECTED in text or self.is_aborting:
            return
        self._pass_on(text)
        if self._level == _LOG_ERROR and text.strip():
            self.errors.append(text.decode(errors="replace").strip())

    def _pass_on(self, text: bytes) -> None:
        """A text may be a part of a line, or several of them."""
        mark = _MARKS.get(self._level)
        if mark is None or not text:
            return
        marked = text[:-1].replace(b"\n", b"\n" + mark) + text[-1:]
        os.write(2, mark + marked if self._is_new_line else marked)
        self._is_new_line = text.endswith(b"\n")


native_log = NativeLog()


def _tell_abort(message: bytes | None) -> None:
    """The last word of a process: the server looks for this line."""
    os.write(2, b"\nnative abort: " + (message or b"").strip().replace(b"\n", b" ") + b"\n")


# The callback object must live as long as the process.
_on_abort = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(_tell_abort)


def _bind_abort() -> None:
    try:
        bind = lib._lib["ggml_set_abort_callback"]
    except AttributeError:
        return  # a library without it prints the message itself, without the mark
    bind.restype, bind.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    bind(ctypes.cast(_on_abort, ctypes.c_void_p))


def start() -> None:
    """Once per process, before anything else here."""
    native_log.install()
    _bind_abort()
    lib.llama_backend_init()


def describe_build() -> tuple[str, str]:
    """Versions of the binding and of llama.cpp with the features it was compiled with."""
    features = lib.llama_print_system_info().decode().strip()
    return version("llama-cpp-python"), f"{lib.llama_version().decode()} {features}"


def devices() -> list[DeviceInfo]:
    """What llama.cpp can compute on. The host's free memory is the system's word: ggml takes all as free."""
    functions = lib._lib
    get = functions["ggml_backend_dev_get"]
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    texts = []
    for which in ("name", "description"):
        text = functions[f"ggml_backend_dev_{which}"]
        text.restype, text.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        texts.append(text)
    kind = functions["ggml_backend_dev_type"]
    kind.restype, kind.argtypes = ctypes.c_int, [ctypes.c_void_p]
    memory = functions["ggml_backend_dev_memory"]
    memory.restype = None
    memory.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)]
    found = []
    for place in range(functions["ggml_backend_dev_count"]()):
        device = get(place)
        name, description = (text(device).decode(errors="replace") for text in texts)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        kind_name = _DEVICE_KINDS.get(kind(device), "accel")
        free_bytes = min(host.free_bytes(), total.value) if kind_name == "cpu" else free.value
        found.append(DeviceInfo(name, description, kind_name, free_bytes, total.value))
    return found


def bind_logits() -> Any:
    """The logits getter with a plain address as result: `as_array` on a pointer is slow."""
    getter = lib._lib["llama_get_logits_ith"]
    getter.restype, getter.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int32]
    return getter


def meta(model: Any, key: str) -> str | None:
    """A model's metadata value as text; None if it has no such key."""
    size = 256
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = lib.llama_model_meta_val_str(model, key.encode(), buffer, size)
        if length < 0:
            return None
        if length < size:
            return buffer.value.decode(errors="replace")
        size = length + 1
