"""The server from start to stop: builds its parts, in order, and takes them down in reverse."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .access.authentication import Authenticator
from .access.certificates import EVERYBODY, Identities, Identity
from .access.keys import KeyStoreError
from .access.live_keys import LiveKeys
from .access.quotas import Limiter
from .access.slowing import Failures
from .config import ConfigError, ServerConfig, available_cores
from .executor.limits import ExecutorLimits
from .executor.probe import probe
from .executor.spawner import Spawner
from .models.costs import CostStore
from .models.estimate import Estimator, has_gpu_backend
from .models.load import LoadMeter
from .models.manager import ModelManager
from .models.pulls import PullManager
from .models.registry import Registry
from .models.shelf import Shelf
from .protocol import DeviceInfo
from .reload import Reloads
from .rpc.access import Access
from .rpc.audit import AuditObserver
from .rpc.calls import Calls
from .rpc.health import Health
from .rpc.identity import Certified
from .rpc.inference import InferenceServicer
from .rpc.listeners import ADMIN, ALL, HEALTH, Listeners
from .rpc.load import GenerationRate
from .rpc.models import ModelServicer
from .rpc.orca import OrcaServicer, add_orca
from .rpc.orca_messages import SERVICE as ORCA_SERVICE
from .rpc.quotas import QuotaGuard
from .rpc.reflection import add_reflection
from .rpc.server_info import ServerServicer
from .rpc.usage import UsageObserver
from .store.store import Store
from .telemetry.logs import dropped_lines
from .telemetry.metrics import Metrics
from .telemetry.request_log import RequestLog
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

# What is left when every generation has ended: last statuses on their way, idle reflection streams.
LAST_CALLS_S = 1.0
# What the last spans get, if streams have used up the grace.
LAST_SPANS_S = 1.0

# Of one connection at a time: twice the crowd that is tested on one, for proxies that bring everybody's calls
# on few. Clients let what is beyond wait; without it one connection could open streams without end.
MAX_CONCURRENT_STREAMS = 2048

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
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
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
        self.health = Health(SERVICES, config.stall_timeout_s)
        self.shelf.feed.listen(self.health.on_model)
        self.calls = Calls()
        self.calls.add(RequestLog(with_prompts=config.log_prompts))
        self.metrics: Metrics | None = None
        if config.metrics_listen:
            self.metrics = self._make_metrics(spawner, cores)
            self.calls.add(self.metrics.calls)
        self.audit = AuditObserver(config.state_dir)
        self.calls.add(self.audit)
        self.usage = UsageObserver(config.state_dir, config.usage_days)
        self.calls.add(self.usage)
        self.limiter = Limiter()
        authenticator = Authenticator() if config.auth == "keys" else None
        access = Access(self.shelf.own_name, authenticator, Failures())
        self.keys: LiveKeys | None = None
        if authenticator is not None:
            self.keys = LiveKeys(config.state_dir, authenticator, access.end_invalid)
        self.identities = Identities(_identities(config))
        listeners = config.all_listeners
        ask_certificates = any(listener.tls == "mutual" for listener in listeners)
        certified = [Certified(self.identities)] if ask_certificates else []
        self._listeners = Listeners(
            listeners,
            config.tls,
            options=_channel_args(config),
            interceptors=[self.calls, *certified, access, QuotaGuard(self.limiter)],
        )
        self._listeners.add(
            model_service_pb2_grpc.add_ModelServiceServicer_to_server,
            ModelServicer(self.shelf, self.manager, self.pulls, estimator, config.stall_timeout_s),
            *(ALL, ADMIN),
        )
        inference = InferenceServicer(
            self.shelf,
            self.manager,
            config.prefix_sharing,
            config.stall_timeout_s,
            config.limits,
            config.max_request_s,
        )
        add_inference = inference_service_pb2_grpc.add_InferenceServiceServicer_to_server
        self._listeners.add(add_inference, inference, ALL)
        self.load, rate = LoadMeter(self.shelf), GenerationRate()
        self.calls.add(rate)
        about = ServerServicer(self.shelf, spawner, config, cores, self.drain, self.load, rate)
        self._listeners.add(server_service_pb2_grpc.add_ServerServiceServicer_to_server, about, ALL, ADMIN)
        self._listeners.add(add_orca, OrcaServicer(self.load, rate, config.stall_timeout_s), ALL, ADMIN)
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
        add("identities", apply=lambda config: self.identities.replace(_identities(config)))
        self.reloads.add_files("catalog", prepare=lambda config: self.shelf.prepare_catalog(config.catalog))

    def _reload(self, config: ServerConfig) -> None:
        self._config = config

    def _make_metrics(self, spawner: Spawner, cores: int) -> Metrics:
        async def devices() -> Sequence[DeviceInfo]:
            return (await probe(spawner)).devices

        return Metrics(
            self.shelf,
            self.manager,
            cores=cores,
            devices=devices if has_gpu_backend() else None,
            dropped_lines=dropped_lines,
        )

    def _add_introspection(self) -> None:
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        add_health = health_pb2_grpc.add_HealthServicer_to_server
        self._listeners.add(add_health, self.health.servicer, ALL, ADMIN, HEALTH)
        reflected = [ALL] if self._config.with_reflection else []
        if self._config.reflection is not False:
            reflected.append(ADMIN)  # on this machine only
        name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        self._listeners.add(add_reflection, [*SERVICES, name, ORCA_SERVICE], *reflected)

    async def start(self) -> None:
        """Listens, loads the models of the configuration, then reports SERVING.

        Raises ConfigError for an address that cannot be bound, for certificates that cannot be used, for
        keys that cannot be read, and what a load raises.
        """
        if self.metrics is not None:
            await self.metrics.open(self._config.metrics_listen)
        if self._config.otlp_endpoint:
            self._tracing = Tracing(self._config.otlp_endpoint, self._config.trace_sample_ratio)
            self.calls.add(self._tracing.observer)
        if self.keys is not None:
            try:
                await self.keys.open()
            except KeyStoreError as exc:
                raise ConfigError(f"state_dir: {exc}") from exc
        self.limiter.restore(await asyncio.to_thread(self.usage.tokens_today))
        self.addresses = self._listeners.bind()
        await self.shelf.open()
        await self.pulls.open()
        await self._listeners.start()
        for name in self._config.load:
            await self.manager.load(name)
        self.health.set_serving()
        self._is_serving = True
        if self.metrics is not None:
            log.info("metrics at http://%s/metrics", self.metrics.address)
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
        self.health.withdraw()
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
        await asyncio.wait({withdrawal}, timeout=grace_s)
        # The listener stays while streams finish: new calls are told DRAINING by a status.
        await self.manager.drain(max(0.0, ends_s - clock()))
        withdrawal.cancel()  # a drain with a longer pause than the grace
        await self.pulls.close()
        await self.manager.close()
        self.shelf.feed.close()
        self.load.close()
        self.health.end_watches()
        await self._listeners.stop(LAST_CALLS_S)
        await self.shelf.close()
        await asyncio.to_thread(self.audit.close)
        await asyncio.to_thread(self.usage.close)
        if self._tracing is not None:
            await self._tracing.close(max(LAST_SPANS_S, ends_s - clock()))
        if self.keys is not None:
            await self.keys.close()
        if self.metrics is not None:
            await self.metrics.close()


def _identities(config: ServerConfig) -> Mapping[str, Identity]:
    return EVERYBODY if config.auth == "off" else config.identities


def _allowed_roots(config: ServerConfig) -> list[Path]:
    return [config.models_dir, *config.allow_path]


def _hub(config: ServerConfig) -> Hub:
    # A third of the server's memory and of its start, which many servers never need.
    from .store.hub import Hub

    return Hub(endpoint=config.hub_endpoint, token=config.hub_token, offline=config.offline)
