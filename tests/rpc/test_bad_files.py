"""Files that are no good: each is refused with its code and cause, and the server goes on."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import CORRUPTIONS, corrupt, cut_places, write_tiny_llama
from tests.helpers.rpc import Api, Code, fails

Spoil = Callable[[Path], None]


def _places() -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        return dict(cut_places(write_tiny_llama(Path(folder) / "model.gguf")))


def _cut(size: int) -> Spoil:
    return lambda path: os.truncate(path, size)


def _corrupt(what: str) -> Spoil:
    return lambda path: corrupt(path, what)


def _be_a_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        # The name of a socket must be short; the folder's may not be.
        before = Path.cwd()
        os.chdir(path.parent)
        try:
            sock.bind(path.name)
        finally:
            os.chdir(before)


def _be_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _be_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


INVALID: dict[str, Spoil] = {
    "empty": _cut(0),
    "text": lambda path: path.write_text("this is no model\n" * 100) and None,
    "directory": _be_a_folder,
    "fifo": _be_a_fifo,
    "socket": _be_a_socket,
    **{f"cut {label}": _cut(size) for label, size in _places().items()},
    **{what: _corrupt(what) for what in CORRUPTIONS},
}


@pytest.fixture
def victim(files: Path) -> AsyncIterator[Path]:
    """A good file, to be spoilt."""
    path = write_tiny_llama(files / "victim.gguf")
    yield path
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
async def registered(api: Api, files: Path) -> AsyncIterator[tuple[str, Path, bytes]]:
    """A model that was good when it was registered: its name, its file, what was in it."""
    path = write_tiny_llama(files / "was-good.gguf")
    await api.register("was-good", path, load_options=pb.LoadOptions(threads=1))
    yield "was-good", path, path.read_bytes()
    await api.delete("was-good")


async def assert_works(api: Api, tiny: str) -> None:
    assert await api.serving("") == "SERVING"
    assert (await api.once(tiny, max_tokens=1)).usage.completion_token_count == 1


@pytest.mark.parametrize("kind", INVALID)
async def test_a_bad_file_is_not_registered(api: Api, tiny: str, victim: Path, kind: str) -> None:
    INVALID[kind](victim)
    status = await fails(api.register("bad", victim), Code.FAILED_PRECONDITION, "MODEL_FILE_INVALID")
    assert status.metadata["path"] == str(victim)
    assert status.metadata["problem"] in status.message
    assert int(status.metadata.get("offset_bytes", 0)) >= 0
    await fails(api.status("bad"), Code.NOT_FOUND, "MODEL_NOT_FOUND")
    await assert_works(api, tiny)


@pytest.mark.parametrize("kind", INVALID)
async def test_a_registered_file_that_became_bad_is_not_loaded(
    api: Api, tiny: str, registered: tuple[str, Path, bytes], kind: str
) -> None:
    name, path, good = registered
    INVALID[kind](path)
    try:
        status = await fails(api.load(name), Code.FAILED_PRECONDITION, "MODEL_FILE_INVALID")
        assert status.metadata["path"] == str(path)
        model = await api.status(name)
        assert (model.state, model.reason) == (pb.MODEL_STATE_FAILED, pb.MODEL_STATE_REASON_LOAD_FAILED)
        assert status.metadata["problem"] in model.message
        assert await api.serving(f"models/{name}") == "NOT_SERVING"
        await fails(api.once(name), Code.FAILED_PRECONDITION, "MODEL_FILE_INVALID")
        await assert_works(api, tiny)
    finally:
        _remove(path)
        path.write_bytes(good)


async def test_a_file_that_is_good_again_is_loaded(api: Api, registered: tuple[str, Path, bytes]) -> None:
    name, path, good = registered
    os.truncate(path, 100)
    await fails(api.load(name), Code.FAILED_PRECONDITION, "MODEL_FILE_INVALID")
    path.write_bytes(good)
    assert (await api.once(name, max_tokens=1)).usage.completion_token_count == 1
    assert await api.serving(f"models/{name}") == "SERVING"
    await api.unload(name)


@pytest.mark.parametrize("what", ["wrong magic", "version 1", "version 99", "unknown architecture"])
async def test_the_refusal_tells_what_is_wrong(api: Api, victim: Path, what: str) -> None:
    corrupt(victim, what)
    status = await fails(api.register("bad", victim), Code.FAILED_PRECONDITION, "MODEL_FILE_INVALID")
    word = {"wrong magic": "GGUF", "unknown architecture": "architecture"}.get(what, "version")
    assert word in status.metadata["problem"]


async def test_a_missing_file_is_not_found(
    api: Api, tiny: str, files: Path, registered: tuple[str, Path, bytes]
) -> None:
    missing = files / "missing.gguf"
    status = await fails(api.register("missing", missing), Code.NOT_FOUND, "MODEL_FILE_NOT_FOUND")
    assert status.metadata == {"path": str(missing)}
    assert status.resource is not None
    assert status.resource.resource_name == str(missing)
    name, path, good = registered
    path.unlink()
    await fails(api.load(name), Code.NOT_FOUND, "MODEL_FILE_NOT_FOUND")
    path.write_bytes(good)
    await assert_works(api, tiny)


async def test_a_path_outside_the_roots_is_refused_whether_it_exists_or_not(
    api: Api, files: Path, tmp_path: Path
) -> None:
    outside = write_tiny_llama(tmp_path / "outside.gguf")
    (files / "link.gguf").symlink_to(outside)
    (files / "folder").symlink_to(tmp_path)
    for path in (
        outside,
        tmp_path / "missing.gguf",
        files / "link.gguf",
        files / "folder" / "outside.gguf",
        files / ".." / outside.relative_to(tmp_path.parent),
        f"{files}-twin/model.gguf",
        "/etc/passwd",
        "/proc/self/environ",
    ):
        status = await fails(api.register("outside", path), Code.PERMISSION_DENIED, "PATH_NOT_ALLOWED")
        assert status.metadata == {"path": str(path)}
    (files / "link.gguf").unlink()
    (files / "folder").unlink()


async def test_a_link_inside_the_roots_is_followed(api: Api, files: Path, victim: Path) -> None:
    link = files / "inside-link.gguf"
    link.symlink_to(victim)
    model = await api.register("linked", link)
    assert model.source.file.path == str(victim)
    await api.delete("linked")
    link.unlink()


async def test_a_link_loop_is_refused(api: Api, files: Path) -> None:
    loop = files / "loop.gguf"
    loop.symlink_to(loop)
    await fails(api.register("loop", loop), Code.PERMISSION_DENIED, "PATH_NOT_ALLOWED")
    loop.unlink()


async def test_a_registered_file_that_became_a_link_out_of_the_roots_is_not_loaded(
    api: Api, registered: tuple[str, Path, bytes], tmp_path: Path
) -> None:
    """The path was checked when it was registered only."""
    name, path, good = registered
    outside = tmp_path / "outside.gguf"
    shutil.move(path, outside)
    path.symlink_to(outside)
    try:
        await fails(api.load(name), Code.PERMISSION_DENIED, "PATH_NOT_ALLOWED")
    finally:
        path.unlink()
        path.write_bytes(good)


@pytest.mark.parametrize("path", ["", "model.gguf", "../model.gguf", "/tmp/a\0b.gguf", "~/model.gguf"])
async def test_a_path_that_is_not_absolute_is_a_bad_field(api: Api, path: str) -> None:
    status = await fails(api.register("relative", path), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == ["path"]


async def test_a_very_long_path_is_refused(api: Api, files: Path) -> None:
    path = files / ("x" * 5000)
    with pytest.raises(Exception) as caught:
        await api.register("long", path)
    assert caught.value.code() in (Code.NOT_FOUND, Code.PERMISSION_DENIED, Code.FAILED_PRECONDITION)  # type: ignore[attr-defined]
