"""The metrics of one server: all its parts, put together and served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from .. import __version__
from ..config import ConfigError
from ..executor.memory import memory_of
from ..models.manager import ModelManager
from ..models.shelf import Shelf
from ..protocol import DeviceInfo
from . import families
from .call_metrics import CallMetrics
from .exposition import text_of
from .model_metrics import ModelMetrics, grouped
from .own_process import own_process, start_time_s
from .scrape import ScrapeServer
from .series import Taken
from .slow import SlowReadings

_OF_SERVER = (families.INFO, families.DRAINING, families.LOG_DROPPED)


class Metrics:
    """Event loop only. `calls` is the observer that counts calls."""

    def __init__(
        self,
        shelf: Shelf,
        manager: ModelManager,
        *,
        cores: int,
        devices: Callable[[], Awaitable[Sequence[DeviceInfo]]] | None = None,
        dropped_lines: Callable[[], int] = lambda: 0,
    ) -> None:
        """`devices` reads the devices' memory, None without a GPU; `dropped_lines` are the log's."""
        self.calls = CallMetrics(lambda name: entry.name if (entry := shelf.find(name)) else None)
        self.slow = SlowReadings(self._memory, devices)
        self._shelf = shelf
        self._manager = manager
        self._dropped_lines = dropped_lines
        self._models = ModelMetrics(shelf, cores=cores, on_forgotten=self.calls.forget)
        self._start_time_s = start_time_s()
        self._server = ScrapeServer(self._text)

    @property
    def address(self) -> str:
        """Where the metrics are served, as HOST:PORT."""
        return self._server.address

    async def open(self, address: str) -> None:
        """Serves them at an address, HOST:PORT. Raises ConfigError if it cannot be bound."""
        host, _, port = address.rpartition(":")
        try:
            await self._server.open(host.strip("[]"), int(port))
        except (OSError, OverflowError) as exc:
            why = "in use, or not this machine's"
            raise ConfigError(f"metrics_listen: cannot bind {address} ({why})") from exc

    async def close(self) -> None:
        """Serves them no more."""
        await self._server.close()
        await self.slow.close()

    def taken(self) -> list[Taken]:
        """All metrics of this moment."""
        about = [
            (families.INFO, (__version__,), 1.0),
            (families.DRAINING, (), float(self._manager.is_draining)),
            (families.LOG_DROPPED, (), float(self._dropped_lines())),
        ]
        return [
            *grouped(about, _OF_SERVER),
            *self.calls.taken(),
            *self._models.taken(),
            *self.slow.taken(),
            *own_process(self._start_time_s),
        ]

    async def _text(self, open_metrics: bool) -> bytes:
        taken = self.taken()
        # Written elsewhere: thousands of lines, and streams wait for this thread.
        return (await asyncio.to_thread(text_of, taken, open_metrics=open_metrics)).encode()

    async def _memory(self) -> dict[str, int]:
        """What each model's worker holds."""
        names = {entry.executor: entry.name for entry in self._shelf.list() if entry.executor is not None}
        return {names[executor]: size for executor, size in (await memory_of(names)).items()}
