"""Locks this process in: no privileges, then Landlock, then seccomp.

Call `confine` while there is one thread: it and those that it starts are bound,
others would stay free.
"""

from __future__ import annotations

import os
import sys

from ..protocol import Confined, Load, Probe
from ..types import SandboxMode, SandboxState


def confine(frame: Load | Probe, mode: SandboxMode) -> Confined:
    """As far as the kernel can: this process reads what the frame's work needs, writes nothing, opens
    no connection and starts no process. Tells what is in force. There is no way back.

    Raises RuntimeError when there are other threads already.
    """
    if mode is SandboxMode.OFF:
        return Confined(SandboxState.OFF, problem="the setting `sandbox` is off")
    if sys.platform != "linux":
        return Confined(SandboxState.OFF, problem=f"there is none for {sys.platform}")
    from . import grants, landlock, privileges, seccomp

    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"{threads} threads run before the sandbox")
    profile = grants.profile(frame)
    problems: list[str] = []
    try:
        privileges.drop()
    except landlock.Unavailable as exc:
        # Without no_new_privs the kernel takes none of the rest.
        return Confined(SandboxState.OFF, profile, problem=str(exc))
    abi, filtered = 0, False
    try:
        abi = landlock.confine(grants.readable(frame), grants.usable(frame))
    except landlock.Unavailable as exc:
        problems.append(str(exc))
    try:
        seccomp.confine()
        filtered = True
    except landlock.Unavailable as exc:
        problems.append(str(exc))
    states = {2: SandboxState.ON, 1: SandboxState.PARTIAL, 0: SandboxState.OFF}
    return Confined(states[bool(abi) + filtered], profile, abi, "; ".join(problems))
