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
from .writing import write

LEAST_INTERVAL_S = 1.0
# A balancer takes 0 for "not told" and gives such a server the others' mean: an idle one tells this.
LEAST = 0.01


def report_of(load: ServerLoad, rate: PerSecond) -> Any:
    """A load as an OrcaLoadReport."""
    models = load.models
    running, slots = sum(model.running for model in models), sum(model.slots for model in models)
    return OrcaLoadReport(
        application_utilization=max(LEAST, load.utilization),
        rps_fractional=max(LEAST, rate.ended),
        eps=rate.failed,
        utilization={
            "slots": min(1.0, running / max(1, slots)),
            "kv_cache": min(1.0, max((model.kv_utilization for model in models), default=0.0)),
        },
        named_metrics={
            "running": running,
            "waiting": sum(model.waiting for model in models),
            "waiting_tokens": sum(model.waiting_tokens for model in models),
            "prefill_tokens_per_second": sum(model.prefill_rate for model in models),
            "decode_tokens_per_second": sum(model.decode_rate for model in models),
        },
    )


class OrcaServicer:
    """`xds.service.orca.v3.OpenRcaService`."""

    def __init__(self, meter: LoadMeter, rate: GenerationRate, stall_timeout_s: float) -> None:
        self._meter = meter
        self._rate = rate
        self._stall_timeout_s = stall_timeout_s

    @answer
    async def StreamCoreMetrics(self, request: Any, context: Any) -> None:
        """Reports now and at the interval that is asked for, a second at least."""
        interval_s = request.report_interval.seconds + request.report_interval.nanos / 1e9
        async with aclosing(self._meter.every(max(LEAST_INTERVAL_S, interval_s))) as loads:
            async for load in loads:
                await write(context, report_of(load, self._rate.read()), self._stall_timeout_s)
        raise Draining()


def add_orca(servicer: OrcaServicer, server: grpc.aio.Server) -> None:
    """Serves it. There is no generated code to register: see `orca_messages`."""
    handler = grpc.unary_stream_rpc_method_handler(
        servicer.StreamCoreMetrics,
        request_deserializer=OrcaLoadReportRequest.FromString,
        response_serializer=OrcaLoadReport.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
