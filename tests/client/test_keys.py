"""Both clients show their API key with every call."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from bear_grpc.client import AsyncClient, Client
from bear_grpc.errors import BearError
from tests.client.fake_server import WAIT_S, FakeServer

# With what each method is called; what is not here takes nothing.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("generate", "stream_text", "generate_once", "tokenize", "count_tokens"), ("m", "text")),
    **dict.fromkeys(
        ("get_model", "get_model_status", "load_model", "unload_model", "delete_model"), ("demo",)
    ),
    **dict.fromkeys(("pull_model", "cancel_pull", "estimate_memory"), ("demo",)),
    "detokenize": ("m", [1]),
    "register_model": ("n", "/n.gguf"),
}
METHODS = [
    name
    for name, value in vars(Client).items()
    if not name.startswith("_") and callable(value) and name not in ("close", "health", "wait_until_serving")
]


@pytest.mark.parametrize("name", METHODS)
def test_key_goes_with_every_call(server: FakeServer, name: str) -> None:
    with Client(server.target, api_key="bear_id_secret", timeout=WAIT_S) as client:
        try:
            found = getattr(client, name)(*ARGUMENTS.get(name, ()))
            if isinstance(found, Iterator):
                next(found)
        except BearError:
            pass  # refused, but called
    assert server.credentials[:1] == ["Bearer bear_id_secret"]


@pytest.mark.parametrize("name", METHODS)
async def test_key_goes_with_every_call_of_the_asyncio_client(server: FakeServer, name: str) -> None:
    async with AsyncClient(server.target, api_key="bear_id_secret", timeout=WAIT_S) as client:
        try:
            found = getattr(client, name)(*ARGUMENTS.get(name, ()))
            if isinstance(found, AsyncIterator):
                await anext(found)
            elif inspect.isawaitable(found):
                await found
        except BearError:
            pass  # refused, but called
    assert server.credentials[:1] == ["Bearer bear_id_secret"]


def test_client_without_a_key_shows_none(server: FakeServer, client: Client) -> None:
    client.server_info()
    assert server.credentials == [None]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("key", ["two words", "line\n", "schlüssel"])
async def test_what_cannot_be_a_key_is_refused_before_any_call(kind: type[Any], key: str) -> None:
    with pytest.raises(ValueError, match="API key"):
        kind("127.0.0.1:1", api_key=key)
