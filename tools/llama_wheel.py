"""Builds llama-cpp-python into a wheel cache, once for each kind of build, and prints the wheel's path.

pip's own cache ignores CMAKE_ARGS and the CPU: after a CPU build it would hand out the CPU wheel for a
CUDA install, and a wheel built with -march=native of another machine. Standard library only: this runs
with the system's Python, before anything is installed.

    ACCEL=cuda python3 -m tools.llama_wheel
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.progress import Status, run_logged, status, tail

PACKAGE = "llama-cpp-python"
PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"

ACCELERATORS: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("-DGGML_CUDA=on",),
    "vulkan": ("-DGGML_VULKAN=on",),
    "metal": ("-DGGML_METAL=on",),
    "rocm": ("-DGGML_HIP=on",),
}
# What the compilers and CMake read from the environment, so a wheel depends on it.
BUILD_VARIABLES = ("CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAARCHS")
# Half of the sources are for what is not used: multimodal input (llama_cpp imports its mtmd_cpp only
# on use; CMAKE_ARGS=-DLLAVA_BUILD=ON puts it back) and llama-common, the library of llama.cpp's programs.
DEFAULT_FLAGS = ("-DLLAVA_BUILD=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF")
# llama-cpp-python forces LLAMA_BUILD_COMMON=ON into CMake's cache; a normal variable hides that (CMP0126).
PROJECT_INCLUDE = "if (NOT LLAVA_BUILD)\n  set(LLAMA_BUILD_COMMON OFF)\nendif()\n"
COMPILERS = ("c++", "g++", "clang++")
PIP_PHASES = ("Downloading", "Installing build", "Preparing metadata", "*** Configuring")
NINJA_STEP = re.compile(r"^\s*\[(\d+)/(\d+)\]")


class BuildError(Exception):
    """The wheel cannot be built; the text says what to install or where the log is."""


def pinned_version() -> str:
    """The version that pyproject.toml names: the one place where it is written."""
    found = re.search(rf'"{PACKAGE}==([^"]+)"', PYPROJECT.read_text(encoding="utf-8"))
    if found is None:
        raise BuildError(f"{PYPROJECT.name} pins no version of {PACKAGE}")
    return found[1]


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("BEAR_CACHE_DIR") or Path(base) / "bear-grpc") / "wheels"


def cpu_identity() -> dict[str, str]:
    """The CPU's model and features: llama.cpp is compiled for the CPU that builds it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        first_core = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
        fields = dict(re.findall(r"^(.+?)\s*:\s*(.*)$", first_core, re.MULTILINE))
        features = sorted((fields.get("flags") or fields.get("Features") or "").split())
        part = " ".join(fields.get(name, "") for name in ("CPU implementer", "CPU part"))
        return {"model": fields.get("model name") or part.strip(), "features": " ".join(features)}
    model = platform.processor()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        model = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or model
    return {"model": model, "features": ""}


def gpu_models() -> list[str]:
    """NVIDIA's GPU models: a CUDA build is made for those that it finds."""
    models = set()
    for info in Path("/proc/driver/nvidia/gpus").glob("*/information"):
        models |= set(re.findall(r"^Model:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE))
    return sorted(models)


def build_key(accel: str) -> dict[str, Any]:
    """All that makes one wheel differ from another. Python's version does not: its tag is py3-none."""
    return {
        "version": pinned_version(),
        "accelerator": accel,
        "flags": [*DEFAULT_FLAGS, *ACCELERATORS[accel]],
        "project_include": PROJECT_INCLUDE,
        "environment": {name: os.environ[name] for name in BUILD_VARIABLES if os.environ.get(name)},
        "cpu": cpu_identity(),
        "gpus": gpu_models() if accel == "cuda" else [],
        "platform": [sysconfig.get_platform(), *platform.libc_ver()],
    }


def cache_folder(key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root() / f"{key['version']}-{key['accelerator']}-{digest}"


def cached_wheel(folder: Path) -> Path | None:
    """The wheel in `folder`, which only exists complete."""
    return next(iter(folder.glob("*.whl")), None)


def get_wheel(accel: str, python: str = sys.executable) -> Path:
    """The wheel for this machine, built with `python`'s pip if the cache lacks it.

    Raises:
        BuildError: a tool is missing, or the build failed.
    """
    if accel not in ACCELERATORS:
        raise BuildError(f"ACCEL={accel} is unknown: use one of {', '.join(ACCELERATORS)}")
    key = build_key(accel)
    folder = cache_folder(key)
    if wheel := cached_wheel(folder):
        return wheel
    check_tools(accel, python)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with build_lock(folder):
        if wheel := cached_wheel(folder):  # built while this process waited
            return wheel
        build(key, folder, python)
    wheel = cached_wheel(folder)
    if wheel is None:
        raise BuildError(f"no wheel in {folder}")
    return wheel


def check_tools(accel: str, python: str) -> None:
    """Name what is missing before minutes are spent on a build."""
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else COMPILERS
    if not any(map(shutil.which, compilers)):
        raise BuildError(
            f"llama.cpp is built from source and no C++ compiler was found ({', '.join(compilers)}).\n"
            "Install one: 'apt-get install g++' (Debian, Ubuntu), 'dnf install gcc-c++' (Fedora), "
            "'xcode-select --install' (macOS)."
        )
    needed = {"cuda": "nvcc", "vulkan": "glslc", "rocm": "hipcc"}.get(accel)
    if needed and not shutil.which(needed) and not os.environ.get("CUDACXX"):
        raise BuildError(f"ACCEL={accel} needs {needed} on the PATH; ACCEL=cpu works without it.")
    if subprocess.run([python, "-c", "import pip"], capture_output=True, check=False).returncode:
        raise BuildError(f"{python} has no pip: run 'make install', or install python3-pip.")


@contextlib.contextmanager
def build_lock(folder: Path) -> Iterator[None]:
    """Two installs at once build one time: the second waits for the first."""
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with status(f"Another install is building {PACKAGE}, waiting for it"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(key: dict[str, Any], folder: Path, python: str) -> None:
    """Build into a folder beside `folder`, then rename: what has the final name is complete."""
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    title = f"Building {PACKAGE} {key['version']} for {key['accelerator']}"
    print(f"{title}: this takes minutes, once. Log: {log}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        target = Path(scratch) / "wheel"
        include = Path(scratch) / "include.cmake"
        include.write_text(PROJECT_INCLUDE, encoding="utf-8")
        command: list[str | Path] = [
            *(python, "-m", "pip", "wheel", "-v", "--no-deps", "--no-cache-dir", "--progress-bar", "off"),
            *("--disable-pip-version-check", "--no-binary", PACKAGE, "--wheel-dir", target),
            f"{PACKAGE}=={key['version']}",
        ]
        with status(title) as line:
            code = run_logged(command, log, lambda text: show(line, text), build_environment(key, include))
            if code != 0:
                raise BuildError(f"pip ended with {code}. The end of {log}:\n{tail(log, 40)}{hint(log)}")
        (target / "key.json").write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
        shutil.copy(log, target / "build.log")
        shutil.rmtree(folder, ignore_errors=True)
        target.rename(folder)
    log.unlink()


def build_environment(key: dict[str, Any], include: Path) -> dict[str, str]:
    env = dict(os.environ)
    # The user's own arguments come last: for CMake the last -D wins.
    hook = shlex.quote(f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={include}")
    env["CMAKE_ARGS"] = " ".join([*key["flags"], hook, env.get("CMAKE_ARGS", "")]).strip()
    env.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # of the make that runs this, not of the build's
        env.pop(name, None)
    return env


def show(line: Status, text: str) -> None:
    """Turn pip's output into the state: the step of ninja, else pip's own phase."""
    if step := NINJA_STEP.match(text):
        line.update(f"[{step[1]}/{step[2]}]")
    elif text.lstrip().startswith(PIP_PHASES):
        line.update(text.strip("* ").split(" (from")[0][:60])


def hint(log: Path) -> str:
    """What to do about the failures that people meet."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if "Killed signal" in text or "cc1plus: out of memory" in text:
        return "The compiler ran out of memory: try CMAKE_BUILD_PARALLEL_LEVEL=1."
    if "No matching distribution" in text or "Could not fetch URL" in text:
        return "pip could not reach its package index: check the network or pip's configuration."
    return "A compiler with C++17 is needed (GCC 9 or Clang 10 and later)."


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tools.llama_wheel", description=__doc__.split("\n")[0])
    parser.add_argument("--accel", default=os.environ.get("ACCEL") or "cpu", choices=list(ACCELERATORS))
    parser.add_argument("--key", action="store_true", help="print the build's key as JSON and build nothing")
    options = parser.parse_args()
    try:
        if options.key:
            print(json.dumps(build_key(options.accel), indent=2))
        else:
            print(get_wheel(options.accel))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
