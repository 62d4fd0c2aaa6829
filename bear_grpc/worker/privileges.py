"""Takes from this process what a worker of a server that runs as root would inherit."""

from __future__ import annotations

import ctypes
import os

from .landlock import Unavailable

_PR_SET_NO_NEW_PRIVS = 38
_VERSION_3 = 0x20080522
# A root server may have models of other users, and may lock more memory than others.
DAC_READ_SEARCH, IPC_LOCK = 2, 14
_KEPT = {DAC_READ_SEARCH, IPC_LOCK}


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def drop() -> None:
    """Sets no_new_privs, then leaves of the capabilities at most those two.

    Some of the others go around Landlock: CAP_PERFMON reads the memory maps and the environment of
    any process. Raises Unavailable.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise Unavailable(f"no_new_privs: {os.strerror(ctypes.get_errno())}")
    header, sets = _Header(_VERSION_3, 0), (_Sets * 2)()
    if libc.capget(ctypes.byref(header), sets):
        raise Unavailable(f"capabilities: {os.strerror(ctypes.get_errno())}")
    for place, half in enumerate(sets):
        kept = sum(1 << number - 32 * place for number in _KEPT if number // 32 == place)
        half.permitted &= kept
        half.effective &= kept
        half.inheritable = 0
    if libc.capset(ctypes.byref(header), sets):
        raise Unavailable(f"capabilities: {os.strerror(ctypes.get_errno())}")
