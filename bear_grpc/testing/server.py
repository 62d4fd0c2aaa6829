"""A real server for the length of a test."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ..config import ServerConfig
from ..executor.spawner import Spawner
from ..server import Server


@contextlib.asynccontextmanager
async def serve_in_process(**settings: Any) -> AsyncIterator[str]:
    """Serves in the running event loop; gives the address for a channel or client.

    The address is a unix socket in a temporary folder, which also holds the
    models' registrations. `settings` are fields of `ServerConfig`, for example
    `load=["bear-demo"]` or `allow_path=[folder]`. Models run in worker
    processes, as always; all of them are gone at the end.
    """
    with tempfile.TemporaryDirectory(prefix="bear-") as folder:
        address = f"unix:{folder}/server.sock"
        config = ServerConfig(
            **{
                "listen": [address],
                "models_dir": Path(folder) / "models",
                "state_dir": Path(folder),
                **settings,
            }
        )
        spawner = Spawner(config.sandbox)
        server = Server(config, spawner)
        try:
            await server.start()
            yield server.addresses[0]
        finally:
            await server.stop(grace_s=0.0)
            spawner.close()
            await asyncio.to_thread(spawner.join)
