from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import grpc
import pytest

from bear_grpc.executor.spawner import Spawner
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import Api, serving

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class NewModel(Protocol):
    """Registers a tiny model under a name of its own; it is gone after the test."""

    async def __call__(self, *, seed: int = 0, load_options: pb.LoadOptions | None = None) -> str: ...


@pytest.fixture(scope="session")
def spawner() -> Iterator[Spawner]:
    thread = Spawner()
    yield thread
    thread.close()
    thread.join()


@pytest.fixture(scope="module")
def faulty() -> Iterator[Spawner]:
    """Starts workers that can be made to fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        thread = Spawner(module="tests.helpers.faulty_worker")
        yield thread
        thread.close()
        thread.join()


@pytest.fixture
def start() -> Iterator[Callable[..., Spawner]]:
    """Makes spawners of other workers; they find this repository's tests."""
    made: list[Spawner] = []

    def new(*args: object, **given: object) -> Spawner:
        made.append(Spawner(*args, **given))  # type: ignore[arg-type]
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        yield new
        for spawner in made:
            spawner.close()
            spawner.join()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the shared server takes models from."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="session")
async def api(spawner: Spawner, files: Path) -> AsyncIterator[Api]:
    """A server that the tests of a session share."""
    async with serving(files, spawner) as (_, stubs):
        yield stubs


@pytest.fixture(scope="session")
def tiny_file(files: Path) -> Path:
    return write_tiny_llama(files / "tiny.gguf", chat_template=TEMPLATE, context_length=2048)


@pytest.fixture(scope="session")
def steady_file(files: Path) -> Path:
    """A model that computes for seconds on a long prompt or answer."""
    return write_tiny_llama(
        files / "steady.gguf",
        n_embd=256,
        n_layer=6,
        n_head=4,
        n_head_kv=4,
        n_ff=1024,
        context_length=2048,
    )


@pytest.fixture(scope="session")
async def demo(api: Api) -> str:
    """The embedded model, loaded; flash attention would make its sums depend on how a prompt is cut."""
    await api.load("bear-demo", flash_attention=False)
    return "bear-demo"


@pytest.fixture(scope="session")
async def tiny(api: Api, tiny_file: Path) -> str:
    """A model with a chat template and no defaults of its own, loaded; one sequence at a time."""
    await api.register("tiny", tiny_file, load_options=pb.LoadOptions(threads=1, max_sequences=1))
    await api.load("tiny")
    return "tiny"


@pytest.fixture(scope="session")
async def _steady(api: Api, steady_file: Path) -> str:
    await api.register("steady", steady_file, load_options=pb.LoadOptions(threads=1, max_sequences=1))
    return "steady"


@pytest.fixture
async def steady(api: Api, _steady: str) -> str:
    """The slow model, loaded and idle; one sequence at a time."""
    await api.load(_steady)
    await api.idle(_steady)
    return _steady


@pytest.fixture(scope="session")
def _numbers() -> Iterator[int]:
    return itertools.count()


@pytest.fixture
async def new_model(api: Api, files: Path, _numbers: Iterator[int]) -> AsyncIterator[NewModel]:
    names: list[tuple[str, Path]] = []

    async def register(*, seed: int = 0, load_options: pb.LoadOptions | None = None) -> str:
        name = f"model-{next(_numbers)}"
        path = write_tiny_llama(files / f"{name}.gguf", seed=seed, context_length=2048)
        names.append((name, path))
        options: Any = load_options or pb.LoadOptions(threads=1, max_sequences=1)
        await api.register(name, path, load_options=options)
        return name

    yield register
    for name, path in names:
        for call in (api.unload(name, 0), api.delete(name)):
            try:
                await call
            except grpc.RpcError:
                continue  # not loaded, or deleted by the test
        path.unlink(missing_ok=True)
