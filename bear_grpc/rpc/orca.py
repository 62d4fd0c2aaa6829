"""Load reports for balancers that speak ORCA, out of band: gRPC's weighted_round_robin, and Envoy's."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from ..errors import Draining
from ..models.load import LoadMeter, ServerLoad
from .load import GenerationRate, PerSecond
from .orca_messages import METHOD, SERVICE, OrcaLoadReport, OrcaLoadReportRequest
from .status import answer
from .writing import Writer

LEAST_INTERVAL_S = 1.0
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
    """`xds.service.orca.v3.OpenRcaService`."""

    def __init__(self, meter: LoadMeter, rate: GenerationRate, stall_timeout_s: float) -> None:
        self._meter = meter
        self._rate = rate
        self._reporter = Reporter()
        self._stall_timeout_s = stall_timeout_s

    @answer
    async def StreamCoreMetrics(self, request: Any, context: Any) -> None:
        """Reports now and at the interval that is asked for, a second at least."""
        interval_s = request.report_interval.seconds + request.report_interval.nanos / 1e9
        with Writer(context, self._stall_timeout_s) as writer:
            async with aclosing(self._meter.every(max(LEAST_INTERVAL_S, interval_s))) as loads:
                async for load in loads:
                    await writer.write(self._reporter.report(load, self._rate.read()))
        raise Draining()


def add_orca(servicer: OrcaServicer, server: grpc.aio.Server) -> None:
    """Serves it. There is no generated code to register: see `orca_messages`."""
    handler = grpc.unary_stream_rpc_method_handler(
        servicer.StreamCoreMetrics,
        request_deserializer=OrcaLoadReportRequest.FromString,
        response_serializer=OrcaLoadReport.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
