from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pytest
from typer.testing import CliRunner, Result

from bear_grpc.cli import app
from tests.client.fake_server import FakeServer


class Bear(Protocol):
    """Runs `bear` with these arguments; `stdin` is piped in."""

    def __call__(self, *args: str, stdin: str | bytes = "") -> Result: ...


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer("127.0.0.1:0")
    yield fake
    fake.stop()


@pytest.fixture
def bear(server: FakeServer) -> Bear:
    def run(*args: str, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(
            app,
            args,
            prog_name="bear",
            input=stdin,
            env={"BEAR_SERVER": server.target},
            catch_exceptions=False,
        )

    return run
