from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from bear_grpc.client import AsyncClient, Client
from tests.client.fake_server import WAIT_S, FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer("127.0.0.1:0")
    yield fake
    fake.stop()


@pytest.fixture
def unix_server(tmp_path: Path) -> Iterator[FakeServer]:
    fake = FakeServer(f"unix:{tmp_path}/s")
    yield fake
    fake.stop()


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, timeout=WAIT_S) as made:
        yield made


@pytest_asyncio.fixture
async def async_client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.target, timeout=WAIT_S) as made:
        yield made
