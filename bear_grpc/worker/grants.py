"""What a confined worker may read: the interpreter, libraries, what tells of the machine, its model."""

from __future__ import annotations

import glob
import os
import re
import sys
from pathlib import Path

from ..protocol import Load, Probe

CPU, GPU = "cpu", "gpu"

_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib")
_STORES = ("/nix/store", "/gnu/store")  # libraries of systems that keep them elsewhere
_LOADER = ("/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/ld.so.conf", "/etc/ld.so.conf.d")
_TIME = ("/etc/localtime", "/etc/timezone", "/usr/share/zoneinfo")
# Not only of this process: entries of /proc are made anew when memory is short, and a rule goes with them.
# What is secret of another process is refused as that of any process outside is.
_MACHINE = (
    "/proc",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
    "/sys/fs/cgroup",
    "/sys/kernel/mm/hugepages",
    "/sys/kernel/mm/transparent_hugepage",
)
_DEVICES = ("/dev/zero", "/dev/random", "/dev/urandom")
_SINKS = ("/dev/null",)

_GPU_DEVICES = ("/dev/nvidia*", "/dev/dri", "/dev/kfd", "/dev/nvhost*", "/dev/nvmap")
# Where drivers keep their libraries, their settings and the lists of what is there.
_GPU_FILES = ("/sys", "/usr", "/opt", "/etc/vulkan", "/etc/OpenCL", "/etc/nvidia", "/etc/glvnd", "/run/udev")

_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


def profile(frame: Load | Probe) -> str:
    """GPU where layers may go to one and the system has such a device, else CPU."""
    layers = None if frame.options is None else frame.options.gpu_layers
    return GPU if layers != 0 and gpu_devices() else CPU


def gpu_devices() -> list[str]:
    """Files and folders of devices that compute."""
    return sorted(found for pattern in _GPU_DEVICES for found in glob.glob(pattern))


def readable(frame: Load | Probe) -> list[str]:
    """What may be read, in this profile, for this frame; not all of it need exist."""
    found = [*_interpreter(), *_LIBRARIES, *_STORES, *_LOADER, *_TIME, *_MACHINE, *_DEVICES]
    if profile(frame) == GPU:
        found += _GPU_FILES
    return [*found, *(() if frame.path is None else model_files(Path(frame.path)))]


def usable(frame: Load | Probe) -> list[str]:
    """What may be written to as well."""
    return [*_SINKS, *(gpu_devices() if profile(frame) == GPU else ())]


def model_files(path: Path) -> list[str]:
    """The file, or all parts of one that is split: llama.cpp finds them by the first one's name."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return [str(path)]
    stem, count = part[1], int(part[2])
    return [str(path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf")) for number in range(1, count + 1)]


def _interpreter() -> list[str]:
    """Python, its modules and the libraries that are loaded already; never the root of all files."""
    package = Path(__file__).resolve().parent.parent
    folders = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, str(package), *sys.path}
    real = {os.path.realpath(folder) for folder in folders if folder}
    return sorted((real | _loaded_libraries()) - {"/"})


def _loaded_libraries() -> set[str]:
    """Files that are mapped into this process: the C library may be anywhere."""
    with open("/proc/self/maps") as lines:
        fields = [line.split(maxsplit=5) for line in lines]
    return {found[5].rstrip("\n") for found in fields if len(found) == 6 and found[5].startswith("/")}
