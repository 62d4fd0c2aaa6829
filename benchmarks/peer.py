"""The peer: llama.cpp's own llama-bench and llama-server, of the very sources that the server runs.

They come from llama-cpp-python's source distribution at the pinned version, built with the flags of the
installed wheel: a difference that is measured is then not one of compilers or releases. Built once for
each version, CPU and set of flags; `python -m benchmarks.peer` builds without measuring.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cache import SetupError, folder, only_one
from tools.llama_wheel import BUILD_VARIABLES, COMPILERS, PACKAGE, cpu_identity, pinned_version
from tools.progress import run_logged, status, tail

TARGETS = ("llama-bench", "llama-server")
# BUILD_SHARED_LIBS as in the wheel; with $ORIGIN the programs find the libraries wherever the folder lies.
FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "-DGGML_CCACHE=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
BUILD_STEP = re.compile(r"^\s*\[\s*(\d+)(?:/(\d+)|%)\]")


@dataclass(frozen=True)
class Peer:
    """Built programs."""

    bench: Path
    server: Path


def built() -> Peer | None:
    """The programs if they have been built before."""
    return _in(_home())


def get() -> Peer:
    """The programs, built if the cache lacks them; takes minutes then.

    Raises:
        SetupError: a tool is missing, or the build failed.
    """
    home = _home()
    if peer := _in(home):
        return peer
    if not any(map(shutil.which, [os.environ.get("CXX", ""), *COMPILERS])):
        raise SetupError("a C++ compiler is needed to build llama-bench and llama-server")
    with only_one(home):
        if peer := _in(home):  # built while this process waited
            return peer
        _build(home)
    peer = _in(home)
    assert peer is not None
    return peer


def _key() -> dict[str, object]:
    return {
        "version": pinned_version(),
        "flags": FLAGS,
        "targets": TARGETS,
        "environment": {name: os.environ[name] for name in BUILD_VARIABLES if os.environ.get(name)},
        "cpu": cpu_identity(),
        "platform": [sysconfig.get_platform(), *platform.libc_ver()],
    }


def _home() -> Path:
    digest = hashlib.sha256(json.dumps(_key(), sort_keys=True).encode()).hexdigest()[:16]
    return folder("peer") / f"{pinned_version()}-{digest}"


def _in(home: Path) -> Peer | None:
    bench, server = (home / name for name in TARGETS)
    return Peer(bench, server) if home.is_dir() else None


def _build(home: Path) -> None:
    """Builds in a folder that a next attempt goes on with; what has the final name is complete."""
    work = home.with_name(f"{home.name}.work")
    work.mkdir(exist_ok=True)
    log = home.with_name(f"{home.name}.log")
    log.unlink(missing_ok=True)
    print(f"Building {' and '.join(TARGETS)}: this takes minutes, once. Log: {log}", file=sys.stderr)
    source = _source(work, log)
    cmake, generator = _build_tools(log)
    build = work / "build"
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS")}
    configure: list[str | Path] = [cmake, "-S", source, "-B", build, *generator, *FLAGS]
    _run("Configuring llama.cpp", configure, log, environment)
    jobs = str(os.cpu_count() or 1)
    # Behind everything else on the machine: a build is no reason to disturb.
    compile_: list[str | Path] = [*_nice(), cmake, "--build", build, "--parallel", jobs, "--target", *TARGETS]
    _run("Building llama.cpp's programs", compile_, log, environment)
    (build / "bin" / "key.json").write_text(json.dumps(_key(), indent=2) + "\n", encoding="utf-8")
    (build / "bin").rename(home)
    shutil.rmtree(work, ignore_errors=True)
    log.unlink()


def _source(work: Path, log: Path) -> Path:
    """llama.cpp's folder in the unpacked source distribution."""
    archives = folder("sdists")
    pattern = f"{PACKAGE.replace('-', '_')}-{pinned_version()}.tar.gz"
    if not (archives / pattern).exists():
        command: list[str | Path] = [
            *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"),
            *("--progress-bar", "off", "--no-binary", PACKAGE, "--dest", archives),
            f"{PACKAGE}=={pinned_version()}",
        ]
        _run(f"Getting the sources of {PACKAGE} {pinned_version()}", command, log)
    unpacked = work / "source"
    source = unpacked / pattern.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    if not (unpacked / "complete").exists():
        shutil.rmtree(unpacked, ignore_errors=True)
        with status("Unpacking"), tarfile.open(archives / pattern) as archive:
            archive.extractall(unpacked, filter="data")
        (unpacked / "complete").touch()
    return source


def _build_tools(log: Path) -> tuple[Path, list[str]]:
    """CMake, and the generator to ask for; of PyPI in an environment of their own if the machine has none."""
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake and (ninja or shutil.which("make")):
        return Path(cmake), ["-G", "Ninja"] if ninja else []
    home = folder("peer") / "build-tools"
    if not (home / "bin" / "ninja").exists():
        _run("Making an environment for CMake", [sys.executable, "-m", "venv", home], log)
        pip: list[str | Path] = [home / "bin" / "python", "-m", "pip", "install", "--quiet"]
        pip += ["--disable-pip-version-check", "cmake", "ninja"]
        _run("Installing CMake and Ninja", pip, log)
    return home / "bin" / "cmake", ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={home / 'bin' / 'ninja'}"]


def _nice() -> list[str]:
    return ["nice", "-n", "10"] if shutil.which("nice") else []


def _run(title: str, command: list[str | Path], log: Path, environment: dict[str, str] | None = None) -> None:
    with status(title) as line:

        def show(text: str) -> None:
            if step := BUILD_STEP.match(text):
                line.update(f"[{step[1]}/{step[2]}]" if step[2] else f"{step[1]} %")

        if code := run_logged(command, log, show, environment):
            raise SetupError(f"{Path(command[0]).name} ended with {code}. The end of {log}:\n{tail(log, 30)}")


def main() -> int:
    try:
        peer = get()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # Both report the version that they were built from.
    for program in (peer.bench, peer.server):
        print(program, subprocess.run([program, "--help"], capture_output=True, check=False).returncode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
