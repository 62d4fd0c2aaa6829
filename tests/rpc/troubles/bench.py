"""What the cases of docs/troubleshooting.md work with: servers, models, calls that must fail as it says."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Unpack

import grpc
import pytest

from bear_grpc.access.caller import Scope
from bear_grpc.access.keys import KeyStore
from bear_grpc.client.options import GenerateOptions
from bear_grpc.executor.spawner import Spawner
from bear_grpc.server import Server
from bear_grpc.v1 import model_service_pb2 as models_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.hub import StandInHub
from tests.helpers.rpc import Api, Code, StatusDetails, fails, serving, stream_fails
from tests.helpers.troubleshooting import REASONS

ONE = pb.LoadOptions(threads=1, max_sequences=1)
LONG: dict[str, Any] = {"max_tokens": 1900, "ignore_eos": True}
REPO, FILE = "owner/repo", "tiny.Q4_K_M.gguf"
PULLED = f"{REPO}:Q4_K_M"
_numbers = itertools.count()


@dataclasses.dataclass
class Bench:
    """`api` is a server that all cases share, which takes models from `files`; `folder` is the case's own."""

    api: Api
    files: Path
    folder: Path
    spawner: Spawner
    start: Callable[..., Spawner]
    steady_file: Path
    patch: pytest.MonkeyPatch
    log: pytest.LogCaptureFixture
    _named: list[str] = dataclasses.field(default_factory=list)

    async def refused(self, call: Awaitable[Any], reason: str) -> StatusDetails:
        """Awaits a unary call that must fail with a reason, and with the code that the page tells for it."""
        return await fails(call, Code[REASONS[reason].code], reason)

    async def cut(self, stream: Any, reason: str) -> StatusDetails:
        """The same of a stream."""
        return (await stream_fails(stream, Code[REASONS[reason].code], reason))[1]

    async def model(self, path: Path | None = None, options: pb.LoadOptions = ONE) -> str:
        """A model on the shared server under a name of its own, which is gone after the case."""
        name = f"trouble-{next(_numbers)}"
        path = path or write_tiny_llama(self.files / f"{name}.gguf", context_length=2048)
        await self.api.register(name, path, load_options=options)
        self._named.append(name)
        return name

    async def close(self) -> None:
        """Takes the models away."""
        for name in self._named:
            for call in (self.api.unload(name, 0), self.api.delete(name)):
                with contextlib.suppress(grpc.RpcError):  # not loaded, or deleted by the case
                    await call

    @contextlib.asynccontextmanager
    async def serving(self, spawner: Spawner | None = None, **settings: Any) -> AsyncIterator[Api]:
        """A server of the case's own; what it keeps in the folder the next one finds."""
        async with self.server(spawner, **settings) as (_, api):
            yield api

    @contextlib.asynccontextmanager
    async def server(
        self, spawner: Spawner | None = None, **settings: Any
    ) -> AsyncIterator[tuple[Server, Api]]:
        """The same, with the server itself."""
        settings = {"allow_path": [self.folder, self.files], **settings}
        async with serving(self.folder, spawner or self.spawner, **settings) as found:
            yield found

    @contextlib.contextmanager
    def hub(self, token: str = "") -> Iterator[StandInHub]:
        """A hub with one model, `PULLED`."""
        path = self.folder / FILE
        if not path.exists():
            write_tiny_llama(path, context_length=512)
        with StandInHub(token) as hub:
            hub.add(REPO, FILE, path)
            yield hub

    def pulling(self, hub: StandInHub, **settings: Any) -> contextlib.AbstractAsyncContextManager[Api]:
        """A server that downloads from it whatever is asked for."""
        return self.serving(**{"auto_pull": "any", "offline": False, "hub_endpoint": hub.url, **settings})

    async def key(self, server: Server, **chosen: Any) -> tuple[str, str]:
        """A key of a server that asks for them, as `bear keys create` makes it: its id and its text."""
        with KeyStore(self.folder / "state") as store:
            made, text = store.create(**{"scopes": frozenset(Scope), **chosen})
        assert server.keys is not None
        await server.keys.refresh()
        return made.id, text


def pull(api: Api, name: str = PULLED) -> Any:
    """The stream of a download."""
    return api.models.PullModel(models_pb.PullModelRequest(name=name))


async def answers(api: Api, model: str, **options: Unpack[GenerateOptions]) -> None:
    """It serves: there is an answer of one token, or what the options ask for."""
    wanted: GenerateOptions = {"max_tokens": 1, "ignore_eos": True}
    wanted.update(options)
    assert (await api.once(model, **wanted)).usage.completion_token_count > 0


async def told_to_wait(told: StatusDetails) -> None:
    """Waits for as long as a refusal says."""
    assert told.retry is not None
    await asyncio.sleep(told.retry.retry_delay.ToTimedelta().total_seconds())
