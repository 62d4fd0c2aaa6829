"""A model that tries to get out of its worker, on every thread that works for it.

It generates as `FakeBackend` does, and writes what came of each attempt to stderr.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import platform
import resource
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from ..backend.base import Batch, Outcome
from ..types import LoadOptions
from ..worker import syscalls
from .backend import FakeBackend
from .vocabulary import FakeVocabulary

MARK = "escape: "  # what a line of the report begins with
DONE = "done"
# Tried as such, or with effects that nobody wants where they are not denied.
_NOT_TRIED = {"fork", "vfork", "vhangup", "reboot"}

_PTRACE_TRACEME, _PR_SET_PDEATHSIG = 0, 1


class Escape:
    """Attempts to use `folder`, a file `secret` in it, the `model` file, and the socket `fd`."""

    def __init__(self, folder: Path, secret: Path, model: Path, fd: int) -> None:
        self._folder, self._secret, self._model, self._fd = folder, secret, model, fd
        self._numbers = itertools.count()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        self._libc.ptrace.restype = ctypes.c_long

    def attempts(self) -> dict[str, Callable[[], object]]:
        """By name; each raises OSError where it is refused."""
        folder, secret, parent = self._folder, self._secret, os.getppid()
        return {
            "tcp": lambda: socket.socket(socket.AF_INET).close(),
            "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
            "unix": lambda: socket.socket(socket.AF_UNIX).close(),
            "socketpair": socket.socketpair,
            "connect": lambda: self._check(self._libc.connect(self._fd, None, 0)),
            "read": secret.read_bytes,
            "list": lambda: os.listdir(folder),
            "root": lambda: os.listdir("/"),
            "users": lambda: Path("/etc/passwd").read_bytes(),
            "environment": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
            "write": lambda: (folder / f"new-{id(self)}-{next(self._numbers)}").write_bytes(b""),
            "model": lambda: self._model.open("r+b").close(),
            "truncate": lambda: os.truncate(secret, 1),
            "remove": lambda: (folder / "spare").unlink(),
            "folder": lambda: (folder / f"folder-{id(self)}-{next(self._numbers)}").mkdir(),
            "link": lambda: (folder / f"link-{id(self)}-{next(self._numbers)}").symlink_to(secret),
            "mode": lambda: secret.chmod(0o644),
            "times": lambda: os.utime(secret),
            "fork": self._fork,
            "spawn": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
            "signal": lambda: os.kill(parent, 0),
            "limits": lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE),
        }

    def last_attempts(self) -> dict[str, Callable[[], object]]:
        """Those that leave a process changed when they succeed."""
        return {
            "exec": lambda: os.execv("/bin/true", ["true"]),
            "ptrace": lambda: self._check(self._libc.ptrace(_PTRACE_TRACEME, 0, None, None)),
            "death signal": lambda: self._check(self._libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)),
            "group": lambda: os.setpgid(0, 0),
            "calls": self._denied_calls,
        }

    def report(self, thread: str, *, last: bool) -> None:
        """Tries everything on this thread, the last attempts too if asked; one line to stderr."""
        found: dict[str, str] = {}
        for name, attempt in {**self.attempts(), **(self.last_attempts() if last else {})}.items():
            try:
                attempt()
            except OSError as exc:
                found[name] = errno.errorcode.get(exc.errno or 0, str(exc))
            else:
                found[name] = DONE
        os.write(2, f"{MARK}{json.dumps({'thread': thread, 'found': found})}\n".encode())

    def _check(self, result: int) -> None:
        if result < 0:
            raise OSError(ctypes.get_errno(), "refused")

    def _fork(self) -> None:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    def _denied_calls(self) -> None:
        """Every call of the deny list, without useful arguments: the filter comes before the kernel looks."""
        column = 0 if platform.machine() == syscalls.X86_64 else 1
        for name, numbers in syscalls.DENIED.items():
            number = numbers[column]
            if number is None or name in _NOT_TRIED:
                continue
            zeros = [ctypes.c_long(0)] * 6
            if self._libc.syscall(ctypes.c_long(number), *zeros) >= 0:
                return
            if ctypes.get_errno() != errno.EPERM:
                raise OSError(ctypes.get_errno(), name)
        raise OSError(errno.EPERM, "refused")


class EscapingBackend(FakeBackend):
    """Tries on the owner thread while it loads, on the text thread at each text, on the owner
    and on a new thread in the first forward."""

    def __init__(self, options: LoadOptions, escape: Escape, *, last: bool) -> None:
        super().__init__(options, vocabulary=_EscapingVocabulary(escape, last=last))
        self._escape, self._last = escape, last
        self._tried = False
        escape.report("owner, loading", last=last)

    def forward(self, batch: Batch) -> Outcome:
        """As the base, after the attempts of the first step."""
        if not self._tried:
            self._tried = True
            self._escape.report("owner", last=self._last)
            new = threading.Thread(target=self._escape.report, args=("new",), kwargs={"last": self._last})
            new.start()
            new.join()
        return super().forward(batch)


class _EscapingVocabulary(FakeVocabulary):
    def __init__(self, escape: Escape, *, last: bool) -> None:
        super().__init__()
        self._escape, self._last = escape, last

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if threading.current_thread().name == "text":
            self._escape.report("text", last=self._last)
        return super().tokenize(text, add_special=add_special, parse_special=parse_special)
