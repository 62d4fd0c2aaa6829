"""A stand-in hub for each test, and this server's way to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bear_grpc.store.hub import Hub
from tests.helpers.hub import StandInHub

TOKEN = "hf_secret-of-the-tests"


@pytest.fixture
def stand_in() -> Iterator[StandInHub]:
    with StandInHub(TOKEN) as stand_in:
        yield stand_in


@pytest.fixture
def hub(stand_in: StandInHub) -> Iterator[Hub]:
    """Without a token."""
    hub = Hub(endpoint=stand_in.url)
    yield hub
    hub.close()


@pytest.fixture
def hub_with_token(stand_in: StandInHub) -> Iterator[Hub]:
    hub = Hub(endpoint=stand_in.url, token=TOKEN)
    yield hub
    hub.close()
