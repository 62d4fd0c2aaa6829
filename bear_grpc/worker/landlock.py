"""Landlock: the kernel lets this process, and what it starts, at the files that are named here only.

It binds the calling thread and those that it starts later, so it must come before any other thread.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable

# The same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_RULE_PATH_BENEATH = 1

_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL_DEV = 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
# Rights of files that each version of the kernel's interface can handle: all of them are, so that
# what no rule grants is refused.
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_NET_ABI, _BIND_AND_CONNECT_TCP = 4, 0b11
_SCOPE_ABI, _ABSTRACT_SOCKETS_AND_SIGNALS = 6, 0b11


class Unavailable(Exception):
    """The kernel does not do it; the message says why."""


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("files", ctypes.c_uint64),
        ("net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _fail(what: str) -> Unavailable:
    return Unavailable(f"Landlock: {what}: {os.strerror(ctypes.get_errno())}")


def abi() -> int:
    """The version of the kernel's interface. Raises Unavailable."""
    found: int = _libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_ASK_VERSION))
    if found < 1:
        raise _fail("the kernel does not have it, or has it turned off")
    return found


def handled(version: int) -> tuple[int, int, int]:
    """Rights of files, of TCP ports, and scopes that this version can take away."""
    files = _FILE_RIGHTS[max(known for known in _FILE_RIGHTS if known <= version)]
    net = _BIND_AND_CONNECT_TCP if version >= _NET_ABI else 0
    return files, net, _ABSTRACT_SOCKETS_AND_SIGNALS if version >= _SCOPE_ABI else 0


def confine(readable: Iterable[str], usable: Iterable[str] = ()) -> int:
    """Takes everything from this thread but reading below `readable`, and all use of the files and
    devices below `usable`; gives the version of the interface.

    Paths that do not exist are left out. no_new_privs must be set. Raises Unavailable, with
    nothing taken.
    """
    libc = _libc()
    version = abi()
    files, net, scoped = handled(version)
    attributes = _Ruleset(files, net, scoped)
    size = 8 if version < _NET_ABI else 16 if version < _SCOPE_ABI else 24
    ruleset = libc.syscall(
        _CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0)
    )
    if ruleset < 0:
        raise _fail("no rules can be made")
    try:
        read = _READ_FILE | _READ_DIR
        for paths, rights in ((readable, read), (usable, read | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV)):
            for path in paths:
                _allow(libc, ruleset, path, rights & files)
        if libc.syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)):
            raise _fail("the rules cannot be put in force")
    finally:
        os.close(ruleset)
    return version


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        parent = os.open(
            path, os.O_PATH | os.O_CLOEXEC
        )  # a link is followed: rules are of files, not of names
    except OSError:
        return  # what cannot be reached needs no rule
    try:
        if not stat.S_ISDIR(os.fstat(parent).st_mode):
            rights &= ~_READ_DIR
        rule = _PathBeneath(rights, parent)
        flags = ctypes.c_uint32(0)
        if libc.syscall(
            _ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_RULE_PATH_BENEATH), ctypes.byref(rule), flags
        ):
            raise _fail(f"no rule for {path}")
    finally:
        os.close(parent)
