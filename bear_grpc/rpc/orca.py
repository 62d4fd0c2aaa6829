"""Load reports for balancers that speak ORCA, out of band: gRPC's weighted_round_robin, and Envoy's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from ..errors import Draining
from ..models.load import LoadMeter, ServerLoad
from .call import current_call
from .load import GenerationRate, PerSecond
from .open_streams import OpenStreams
from .orca_messages import METHOD, SERVICE, OrcaLoadReport, OrcaLoadReportRequest
from .status import answer
from .writing import Writer

LEAST_INTERVAL_S = 1.0
# A report that is no older is sent again: what streams cost together is to send it.
FRESH_S = LEAST_INTERVAL_S / 2
# Balancers open one each. Sending a report takes some 0.1 ms, of all of these a fortieth of the event loop.
MAX_STREAMS = 256
# A balancer takes 0 for "not told" and gives such a server the others' mean.
LEAST = 0.01
# Tokens per second that an idle server is taken to be capable of, until it has shown what it is: more than
# most are, or one that has just come would get nothing beside those that are busy and fast.
FIRST_CAPACITY = 10_000.0


class Reporter:
    """Makes reports by which balancers can weigh servers.

    They weigh each by rps / utilization. A request is no measure of work here: what is told as its rate
    are tokens per second, so a weight is the tokens per second that a server is capable of, and less where
    more is asked of it. One that idles shows nothing: it tells the most that it has been capable of.
    """

    def __init__(self) -> None:
        self._capacity = 0.0

    def report(self, load: ServerLoad, rate: PerSecond) -> Any:
        """A load as an OrcaLoadReport."""
        models = load.models
        running, slots = sum(model.running for model in models), sum(model.slots for model in models)
        prefill, decode = (
            sum(model.prefill_rate for model in models),
            sum(model.decode_rate for model in models),
        )
        utilization, tokens = max(LEAST, load.utilization), max(LEAST, prefill + decode)
        if load.utilization:
            self._capacity = max(self._capacity, tokens / utilization)
        else:
            tokens = utilization * (self._capacity or FIRST_CAPACITY)
        return OrcaLoadReport(
            application_utilization=utilization,
            rps_fractional=tokens,
            eps=tokens * rate.failed / rate.ended if rate.ended else 0.0,  # the same part of the rate
            utilization={
                "slots": min(1.0, running / max(1, slots)),
                "kv_cache": min(1.0, max((model.kv_utilization for model in models), default=0.0)),
            },
            named_metrics={
                "running": running,
                "waiting": sum(model.waiting for model in models),
                "waiting_tokens": sum(model.waiting_tokens for model in models),
                "prefill_tokens_per_second": prefill,
                "decode_tokens_per_second": decode,
            },
        )


class OrcaServicer:
    """`xds.service.orca.v3.OpenRcaService`. Event loop only."""

    def __init__(
        self,
        meter: LoadMeter,
        rate: GenerationRate,
        stall_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._meter = meter
        self._rate = rate
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._reporter = Reporter()
        self._open = OpenStreams(MAX_STREAMS)
        self._report: Any = None
        self._made_s = 0.0
        self._making: asyncio.Task[None] | None = None

    @answer
    async def StreamCoreMetrics(self, interval_s: float, context: Any) -> None:
        """Reports now and at the interval that is asked for, a second at least."""
        with self._open.one(current_call(context).caller.tenant):
            await self._stream(interval_s, context)

    @answer  # inside of its place: a stream is open until its status has been taken
    async def _stream(self, interval_s: float, context: Any) -> None:
        # With the first message, which may never be read, gRPC would not know that they are sent.
        await context.send_initial_metadata(())
        with Writer(context, self._stall_timeout_s) as writer:
            async with aclosing(self._meter.ticks(max(LEAST_INTERVAL_S, interval_s))) as ticks:
                async for _ in ticks:
                    await writer.write(await self._latest())
        raise Draining()

    async def _latest(self) -> Any:
        """The report of all streams, made anew where it is older than FRESH_S."""
        if self._report is None or self._clock() - self._made_s >= FRESH_S:
            if self._making is None or self._making.done():
                self._making = asyncio.create_task(self._make())
            await asyncio.shield(self._making)  # who leaves does not end it for the others
        return self._report

    async def _make(self) -> None:
        self._report = self._reporter.report(await self._meter.read(), self._rate.read())
        self._made_s = self._clock()


def add_orca(servicer: OrcaServicer, server: grpc.aio.Server) -> None:
    """Serves it. There is no generated code to register: see `orca_messages`."""
    handler = grpc.unary_stream_rpc_method_handler(
        servicer.StreamCoreMetrics,
        request_deserializer=_interval_s,
        response_serializer=OrcaLoadReport.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))


def _interval_s(request: bytes) -> float:
    """What is asked for. The rest, which may be long, is not kept for as long as the stream lasts."""
    interval = OrcaLoadReportRequest.FromString(request).report_interval
    return float(interval.seconds + interval.nanos / 1e9)
