"""Makes `.venv` with bear_grpc and everything that develops it; does nothing when that is up to date.

A stamp in `.venv` holds a digest of what the installation came from: pyproject.toml, the constraints,
the llama-cpp-python wheel's key and the Python version. Standard library only.

    python3 -m tools.install [--accel cuda] [--freeze]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tools import llama_wheel
from tools.progress import Status, run_logged, status, tail

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "bear-installed.json"
LOG = VENV / "bear-install.log"
CONSTRAINTS = ROOT / "deploy" / "constraints.txt"
CONSTRAINTS_HEADER = """\
# Exact versions for development, tests and images: `make install` passes this file to pip.
# Written by `make freeze`. No addresses, and no llama-cpp-python: pyproject.toml pins it, and
# tools/llama_wheel.py builds it.
"""
OLDEST_PYTHON = (3, 11)


class InstallError(Exception):
    """The environment could not be made; the text says what to do."""


def wanted_state(accel: str) -> dict[str, str]:
    """What the stamp of an up-to-date `.venv` says."""
    inputs = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", CONSTRAINTS):
        inputs.update(path.read_bytes())
    return {
        "inputs": inputs.hexdigest(),
        "llama_wheel": llama_wheel.cache_folder(llama_wheel.build_key(accel)).name,
        "python": ".".join(map(str, sys.version_info[:2])),
        "place": str(ROOT),  # the scripts of a moved environment name its old place
    }


def installed_state() -> dict[str, str]:
    """The stamp, or nothing when the last installation did not end."""
    if not VENV_PYTHON.exists():
        return {}
    try:
        return dict(json.loads(STAMP.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def install(accel: str) -> bool:
    """Bring `.venv` up to date; False when it was."""
    if accel not in llama_wheel.ACCELERATORS:
        raise InstallError(f"ACCEL={accel} is unknown: use one of {', '.join(llama_wheel.ACCELERATORS)}")
    wanted, found = wanted_state(accel), installed_state()
    if wanted == found:
        return False
    STAMP.unlink(missing_ok=True)
    if make_venv(wanted):
        found = {}
    LOG.unlink(missing_ok=True)
    wheel = llama_wheel.get_wheel(accel, python=str(VENV_PYTHON))
    if wanted["llama_wheel"] != found.get("llama_wheel"):
        # pip takes wheels of one version for equal, so another build must be forced in.
        pip("Installing llama-cpp-python", "install", "--force-reinstall", "--no-deps", wheel)
    ours_only = ("--only-binary", llama_wheel.PACKAGE, "--find-links", wheel.parent)
    pip("Installing bear_grpc and its tools", "install", *ours_only, "-c", CONSTRAINTS, "-e", f"{ROOT}[dev]")
    STAMP.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    return True


def make_venv(wanted: dict[str, str]) -> bool:
    """Make `.venv`, anew if it does not run, has moved, or belongs to another Python; False if it is good."""
    if VENV_PYTHON.exists():
        code = "import sys, pip; print('.'.join(map(str, sys.version_info[:2])), sys.prefix)"
        probe = subprocess.run([VENV_PYTHON, "-c", code], capture_output=True, text=True, check=False)
        if probe.stdout.strip() == f"{wanted['python']} {VENV}":
            return False
    print(f"Making {VENV} with {sys.executable}", file=sys.stderr)
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if made.returncode != 0:
        raise InstallError(f"{made.stdout}\n'python -m venv' failed; on Debian: apt-get install python3-venv")
    return True


def pip(title: str, *arguments: str | Path) -> None:
    """Run `.venv`'s pip with its output in the log and its progress on one line."""
    command = [VENV_PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments, "--progress-bar", "off"]
    with status(title) as line:
        if run_logged(command, LOG, lambda text: show(line, text)) != 0:
            raise InstallError(f"pip failed. The end of {LOG}:\n{tail(LOG, 25)}")


def show(line: Status, text: str) -> None:
    phase = text.strip().split(" (from")[0]
    if phase.startswith(("Collecting", "Downloading", "Preparing", "Building")):
        line.update(phase[:70])
    elif phase.startswith("Installing collected packages"):
        line.update(f"unpacking {phase.count(',') + 1} packages")


def freeze() -> None:
    """Write the constraints file from what `.venv` holds now."""
    command = [str(VENV_PYTHON), "-m", "pip", "freeze", "--exclude-editable", "--exclude", "llama-cpp-python"]
    frozen = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pins = [line for line in frozen if "==" in line and "://" not in line]
    CONSTRAINTS.write_text(CONSTRAINTS_HEADER + "\n".join(pins) + "\n", encoding="utf-8")
    print(f"{CONSTRAINTS.relative_to(ROOT)}: {len(pins)} versions", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tools.install", description=__doc__.split("\n")[0])
    parser.add_argument("--accel", default=os.environ.get("ACCEL") or "cpu")
    parser.add_argument("--freeze", action="store_true", help="write deploy/constraints.txt from .venv")
    options = parser.parse_args()
    if sys.version_info < OLDEST_PYTHON:
        print(
            f"error: Python 3.11 or later is needed, {sys.executable} is {sys.version.split()[0]};"
            " choose one with 'make PYTHON=python3.11'",
            file=sys.stderr,
        )
        return 1
    try:
        if options.freeze:
            freeze()
        elif install(options.accel):
            print(f"Installed in {VENV}", file=sys.stderr)
    except (InstallError, llama_wheel.BuildError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
