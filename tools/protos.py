"""Generates `bear_grpc/v1` and ORCA's descriptors from `protos/`, compares them, keeps the baseline.

python -m tools.protos            generate
python -m tools.protos --check    compare a fresh generation with what is there, byte by byte
python -m tools.protos --breaking compare the API with protos/baseline.binpb
python -m tools.protos --image    make today's API that baseline (at a release)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PACKAGE = Path("bear_grpc", "v1")
BASELINE = PROTOS / "baseline.binpb"
# Descriptors, not code: generated code would take names that other packages bring as well.
ORCA = Path("bear_grpc", "rpc", "orca.binpb")
ORCA_SOURCES = ("xds/data/orca/v3/orca_load_report.proto", "xds/service/orca/v3/orca.proto")
SCRIPTS = Path(sys.executable).parent
HAND_WRITTEN = {"__init__.py"}


class ProtoError(Exception):
    """protoc or buf failed, or the committed code is not what they write."""


def sources() -> list[Path]:
    found = sorted((PROTOS / PACKAGE).glob("*.proto"))
    if not found:
        raise ProtoError(f"no .proto files in {PROTOS / PACKAGE}")
    return found


def protoc(target: Path) -> None:
    """Write messages, stubs and their types below `target`.

    The .pyi files come from mypy-protobuf, which types the gRPC stubs and carries the proto comments;
    protoc's own --pyi_out covers messages only.
    """
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}"),
        f"--plugin=protoc-gen-mypy={SCRIPTS / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={SCRIPTS / 'protoc-gen-mypy_grpc'}",
        *(f"--python_out={target}", f"--grpc_python_out={target}"),
        *(f"--mypy_out=quiet:{target}", f"--mypy_grpc_out=quiet:{target}"),
        *(str(path.relative_to(PROTOS)) for path in sources()),
    ]
    run_protoc(command)


def orca() -> bytes:
    """The descriptors of ORCA's two files, in the order in which they need each other."""
    with tempfile.TemporaryDirectory(prefix="bear-protos-") as scratch:
        target = Path(scratch, ORCA.name)
        command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}"]
        run_protoc([*command, f"--descriptor_set_out={target}", *ORCA_SOURCES])
        return target.read_bytes()


def run_protoc(command: Sequence[str]) -> None:
    if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
        raise ProtoError("protoc failed")


def contents(folder: Path) -> dict[str, bytes]:
    """The generated files of a folder, by name."""
    files = (path for path in folder.glob("*") if path.is_file() and path.name not in HAND_WRITTEN)
    return {path.name: path.read_bytes() for path in files}


def fresh() -> dict[str, bytes]:
    """What the protos generate now."""
    with tempfile.TemporaryDirectory(prefix="bear-protos-") as scratch:
        protoc(Path(scratch))
        return contents(Path(scratch) / PACKAGE)


def generate() -> None:
    folder = ROOT / PACKAGE
    folder.mkdir(exist_ok=True)
    wanted, found = fresh(), contents(folder)
    for name in found.keys() - wanted.keys():
        (folder / name).unlink()
        print(f"removed {PACKAGE / name}")
    for name, data in sorted(wanted.items()):
        if found.get(name) != data:
            (folder / name).write_bytes(data)
            print(f"wrote {PACKAGE / name}")
    (ROOT / ORCA).write_bytes(orca())
    print(f"{PACKAGE}: {len(wanted)} generated files, and {ORCA}")


def check() -> None:
    wanted, found = fresh(), contents(ROOT / PACKAGE)
    stale = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    paths = [PACKAGE / name for name in stale]
    if not (ROOT / ORCA).exists() or (ROOT / ORCA).read_bytes() != orca():
        paths.append(ORCA)
    if paths:
        names = "\n".join(f"  {path}" for path in paths)
        raise ProtoError(f"generated code differs from the protos:\n{names}\nRun 'make proto'.")
    print(f"{PACKAGE}: {len(wanted)} generated files agree with the protos, and so does {ORCA}")


def buf(*arguments: str | Path) -> None:
    """Run buf, which comes from PyPI and reads only local files."""
    command = [SCRIPTS / "buf", *arguments]
    with tempfile.TemporaryDirectory(prefix="bear-buf-") as cache:
        env = {**os.environ, "BUF_CACHE_DIR": cache}
        if subprocess.run(command, env=env, stdin=subprocess.DEVNULL, check=False).returncode:
            raise ProtoError(f"buf {arguments[0]} failed")


def breaking() -> None:
    buf("breaking", PROTOS, "--against", BASELINE)
    print(f"no breaking change against {BASELINE.relative_to(ROOT)}")


def image() -> None:
    # Without comments: a change of wording is not a change of the API.
    buf("build", PROTOS, "--exclude-source-info", "-o", BASELINE)
    print(f"{BASELINE.relative_to(ROOT)}: {BASELINE.stat().st_size} bytes")


def lint() -> None:
    buf("lint", PROTOS)
    print("protos: no findings")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.protos", description=__doc__.split("\n")[0])
    actions = parser.add_mutually_exclusive_group()
    for action, text in (
        (check, "compare bear_grpc/v1 with a fresh generation"),
        (breaking, "look for breaking changes against the baseline"),
        (image, "write the baseline image"),
        (lint, "run buf lint"),
    ):
        flag = f"--{action.__name__}"
        actions.add_argument(flag, dest="action", action="store_const", const=action, help=text)
    action = parser.parse_args().action or generate
    try:
        action()
    except ProtoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
