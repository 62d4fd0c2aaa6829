"""The server from start to stop: builds its parts, in order, and takes them down in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio

from . import __version__
from .access.authentication import Authenticator
from .access.keys import KeyStoreError
from .access.live_keys import LiveKeys
from .access.slowing import Failures
from .config import EXIT_CONFIG, ConfigError, ServerConfig, available_cores
from .errors import BearError
from .executor.limits import ExecutorLimits
from .executor.spawner import Spawner
from .models.costs import CostStore
from .models.estimate import Estimator
from .models.load import LoadMeter
from .models.manager import ModelManager
from .models.pulls import PullManager
from .models.registry import Registry
from .models.shelf import Shelf
from .reload import Reloads
from .rpc.access import Access
from .rpc.audit import AuditObserver
from .rpc.calls import Calls
from .rpc.health import Health
from .rpc.inference import InferenceServicer
from .rpc.load import GenerationRate
from .rpc.models import ModelServicer
from .rpc.orca import OrcaServicer, add_orca
from .rpc.orca_messages import SERVICE as ORCA_SERVICE
from .rpc.reflection import add_reflection
from .rpc.server_info import ServerServicer
from .store.store import Store
from .telemetry.tracing import Tracing
from .v1 import (
    inference_service_pb2,
    inference_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
)

if TYPE_CHECKING:
    from .store.hub import Hub

log = logging.getLogger(__name__)

EXIT_START = 1
NICE_OF_SERVER = 10
# What is left when every generation has ended: last statuses on their way, idle reflection streams.
LAST_CALLS_S = 1.0
# What the last spans get, if streams have used up the grace.
LAST_SPANS_S = 1.0
# Health's statuses are set in order, each within a second.
STATUSES_S = 5.0

SERVICES = [
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    server_service_pb2.DESCRIPTOR.services_by_name["ServerService"].full_name,
]


def _channel_args(config: ServerConfig) -> list[tuple[str, int]]:
    """gRPC's own options; a name that it does not know it ignores without a word."""
    return [
        # A second server on the port would share its connections without an error.
        ("grpc.so_reuseport", 0),
        # Counted after decompression, and before what is too large is unpacked.
        ("grpc.max_receive_message_length", config.limits.max_message_bytes),
        # Between the two gRPC refuses by chance.
        ("grpc.max_metadata_size", config.limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", config.limits.max_metadata_bytes),
        # A client that vanishes without a word frees its slot after these times.
        ("grpc.keepalive_time_ms", round(config.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        # What ends a connection in truth, and a minute by itself: the one above is not heeded any more.
        ("grpc.http2.ping_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


class Server:
    """A server in the running event loop. `start`, then `stop`."""

    def __init__(self, config: ServerConfig, spawner: Spawner) -> None:
        cores = available_cores()
        self._config = config
        self._stopped = False
        self._is_serving = False
        self._draining: asyncio.Task[None] | None = None
        self._tracing: Tracing | None = None
        self.addresses: list[str] = []
        costs = CostStore(config.models_dir / "costs")
        self.shelf = Shelf(
            spawner=spawner,
            registry=Registry(config.models_dir / "registered"),
            costs=costs,
            allowed_roots=_allowed_roots(config),
            configured=config.models,
            catalog=config.catalog,
        )
        self.pulls = PullManager(
            self.shelf,
            Store(config.models_dir, hub_cache=config.hub_cache),
            functools.partial(_hub, config),
            auto_pull=config.auto_pull,
            max_pulls=config.max_pulls,
            bytes_per_s=config.pull_rate_limit_mb_s * 1e6,
        )
        estimator = Estimator(spawner=spawner, cores=cores)
        limits = ExecutorLimits(
            max_waiting=config.max_waiting_requests,
            max_waiting_tokens=config.max_waiting_tokens,
            stall_timeout_s=config.stall_timeout_s,
            step_target_s=config.step_target_ms / 1000,
            share_prefixes=config.prefix_sharing != "off",
            priority_aging_s=config.priority_aging_s,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            max_restarts=config.max_restarts_per_request,
            input=config.limits,
        )
        self.manager = ModelManager(
            self.shelf,
            spawner=spawner,
            costs=costs,
            limits=limits,
            cores=cores,
            keep_alive_s=config.keep_alive_s,
            ensure_file=self.pulls.ensure,
            plan=estimator.need,
        )
        self.health = Health(SERVICES)
        self.shelf.feed.listen(self.health.on_model)
        self.calls = Calls()
        self.audit = AuditObserver(config.state_dir)
        self.calls.add(self.audit)
        authenticator = Authenticator() if config.auth == "keys" else None
        access = Access(self.shelf.own_name, authenticator, Failures())
        self.keys: LiveKeys | None = None
        if authenticator is not None:
            self.keys = LiveKeys(config.state_dir, authenticator, access.end_invalid)
        self._server = grpc.aio.server(options=_channel_args(config), interceptors=[self.calls, access])
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(self.shelf, self.manager, self.pulls, estimator, config.stall_timeout_s),
            self._server,
        )
        inference = InferenceServicer(
            self.shelf,
            self.manager,
            config.prefix_sharing,
            config.stall_timeout_s,
            config.limits,
            config.max_request_s,
        )
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)
        self.load, rate = LoadMeter(self.shelf), GenerationRate()
        self.calls.add(rate)
        about = ServerServicer(self.shelf, spawner, config, cores, self.drain, self.load, rate)
        server_service_pb2_grpc.add_ServerServiceServicer_to_server(about, self._server)
        add_orca(OrcaServicer(self.load, rate, config.stall_timeout_s), self._server)
        self._add_introspection()
        self.reloads = Reloads(config)
        self.reloads.add("limits", "max_request_s", apply=inference.reload)
        self.reloads.add("limits", "max_waiting_requests", apply=about.reload)
        self._add_reloads()

    def _add_reloads(self) -> None:
        """What a running server takes over of changed settings; the types of the settings tell the same."""
        add = self.reloads.add
        add("stop_grace_s", "withdrawal_s", apply=self._reload)
        add("log_level", apply=lambda config: logging.getLogger().setLevel(config.log_level))
        add("allow_path", apply=lambda config: self.shelf.set_allowed_roots(_allowed_roots(config)))
        add("auto_pull", apply=lambda config: self.pulls.set_auto_pull(config.auto_pull))
        add(
            "pull_rate_limit_mb_s",
            apply=lambda config: self.pulls.set_rate(config.pull_rate_limit_mb_s * 1e6),
        )
        hub = ("hub_endpoint", "hub_token", "offline")
        add(*hub, apply=lambda config: self.pulls.set_hub(functools.partial(_hub, config)))
        add(
            "max_waiting_requests",
            apply=lambda config: self.manager.set_max_waiting(config.max_waiting_requests),
        )
        add("keep_alive_s", apply=lambda config: self.manager.set_keep_alive(config.keep_alive_s))
        self.reloads.add_files("catalog", prepare=lambda config: self.shelf.prepare_catalog(config.catalog))

    def _reload(self, config: ServerConfig) -> None:
        self._config = config

    def _add_introspection(self) -> None:
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, self._server)
        if self._config.with_reflection:
            name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            add_reflection([*SERVICES, name, ORCA_SERVICE], self._server)

    async def start(self) -> None:
        """Listens, loads the models of the configuration, then reports SERVING.

        Raises ConfigError for an address that cannot be bound and for keys that cannot be read, and what a
        load raises.
        """
        if self._config.otlp_endpoint:
            self._tracing = Tracing(self._config.otlp_endpoint, self._config.trace_sample_ratio)
            self.calls.add(self._tracing.observer)
        if self.keys is not None:
            try:
                await self.keys.open()
            except KeyStoreError as exc:
                raise ConfigError(f"state_dir: {exc}") from exc
        await self.health.open()
        for address in self._config.listen:
            try:
                port = self._server.add_insecure_port(address)
            except RuntimeError as exc:
                raise ConfigError(f"listen: cannot bind {address} (in use, or not this machine's)") from exc
            is_socket = address.startswith("unix")
            self.addresses.append(address if is_socket else f"{address.rpartition(':')[0]}:{port}")
        await self.shelf.open()
        await self.pulls.open()
        await self._server.start()
        for name in self._config.load:
            await self.manager.load(name)
        await self.health.set_serving()
        self._is_serving = True
        log.info("bear_grpc %s serves on %s", __version__, ", ".join(self.addresses))

    async def drain(self) -> int:
        """Withdraws the server: NOT_SERVING, then a pause, then no new work. It goes on running.

        Returns after the pause, with the generations that are still under way. A later
        call joins the first one.
        """
        await asyncio.shield(self._withdrawal(self._config.pause_s))
        return self.manager.remaining

    def _withdrawal(self, pause_s: float) -> asyncio.Task[None]:
        if self._draining is None:
            self._draining = asyncio.create_task(self._withdraw(pause_s))
        return self._draining

    async def _withdraw(self, pause_s: float) -> None:
        if pause_s == 0:
            self.manager.refuse()  # before anybody is told
        await self.health.withdraw()
        # Balancers and clients that watch health send their calls elsewhere meanwhile.
        await asyncio.sleep(pause_s)
        self.manager.refuse()
        if self.manager.remaining:
            log.info("no new work is taken, %d requests are under way", self.manager.remaining)

    async def stop(self, grace_s: float | None = None) -> None:
        """Takes no new work, lets streams finish within the grace, ends every worker.

        The pause of the withdrawal is part of the grace. A second call does nothing.
        """
        if self._stopped:
            return
        self._stopped = True
        clock = asyncio.get_running_loop().time
        grace_s = self._config.stop_grace_s if grace_s is None else grace_s
        ends_s = clock() + grace_s
        withdrawal = self._withdrawal(min(self._config.pause_s, grace_s) if self._is_serving else 0.0)
        await asyncio.wait({withdrawal}, timeout=max(grace_s, STATUSES_S))
        # The listener stays while streams finish: new calls are told DRAINING by a status.
        await self.manager.drain(max(0.0, ends_s - clock()))
        withdrawal.cancel()  # a drain with a longer pause than the grace
        await self.pulls.close()
        await self.manager.close()
        self.shelf.feed.close()
        self.load.close()
        self.health.end_watches()
        await self._server.stop(LAST_CALLS_S)
        await self.shelf.close()
        await self.health.close()
        await asyncio.to_thread(self.audit.close)
        if self._tracing is not None:
            await self._tracing.close(max(LAST_SPANS_S, ends_s - clock()))
        if self.keys is not None:
            await self.keys.close()


def _allowed_roots(config: ServerConfig) -> list[Path]:
    return [config.models_dir, *config.allow_path]


def _hub(config: ServerConfig) -> Hub:
    # A third of the server's memory and of its start, which many servers never need.
    from .store.hub import Hub

    return Hub(endpoint=config.hub_endpoint, token=config.hub_token, offline=config.offline)


def serve(config: ServerConfig, reread: Callable[[], ServerConfig] | None = None) -> int:
    """Runs a server until SIGTERM or SIGINT; gives the exit code. A second signal ends at once.

    At SIGHUP it takes over what `reread` gives. When the terminal that it was started from is closed,
    SIGHUP ends it, as other programs.
    """
    logging.basicConfig(
        level=config.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    spawner = Spawner(config.sandbox)
    _lower_priority()
    try:
        return asyncio.run(_serve(config, spawner, reread))
    finally:
        spawner.close()


def _has_terminal() -> bool:
    """Whether this process has a terminal that could hang up."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _lower_priority() -> None:
    """Puts this thread, and those it starts, behind the workers: they wait for each
    other at every barrier, and a busy neighbour would cost them half their speed."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, NICE_OF_SERVER)


async def _serve(config: ServerConfig, spawner: Spawner, reread: Callable[[], ServerConfig] | None) -> int:
    stopping = asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            # Workers die with the spawner thread, or see the closed socket.
            os._exit(128 + signal.SIGTERM)
        log.info("stopping; a second signal ends at once")
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    server = Server(config, spawner)
    reloading: set[asyncio.Task[None]] = set()
    # Whoever starts it with nohup wants it to outlive its terminal.
    may_hang_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()

    def on_hangup() -> None:
        if may_hang_up and not _has_terminal():
            on_signal()
        elif reread is not None and not stopping.is_set():
            task = asyncio.create_task(server.reloads.reload(reread))
            reloading.add(task)
            task.add_done_callback(reloading.discard)

    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    starting = asyncio.create_task(server.start())
    signalled = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({starting, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await stopping.wait()
    except ConfigError as exc:
        log.error("%s", exc)
        return EXIT_CONFIG
    except BearError as exc:
        log.error("the server cannot start: %s [%s]", exc, exc.reason)
        return EXIT_START
    finally:
        for task in (starting, signalled, *reloading):
            task.cancel()
        await asyncio.wait({starting, signalled, *reloading})
        await server.stop()
    return 0
