"""Traces to an OTLP collector. OpenTelemetry is the extra `bear-grpc[otel]`, imported when asked for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from typing import TYPE_CHECKING

from .. import __version__
from ..config import ConfigError
from ..rpc.calls import CallObserver

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

SERVICE = "bear-grpc"
EXPORT_TIMEOUT_S = 5.0
INTERVAL_MS = 1000


class Tracing:
    """Spans of the calls it observes, sent to a collector by a thread of its own, which may lose them.

    Neither a call nor the event loop ever waits for the collector; at most 2,048 spans wait for it.
    """

    def __init__(self, endpoint: str, sample_ratio: float) -> None:
        """`endpoint` is a URL; plain text if it begins with http://. Calls that belong to a trace are
        sampled if that is, of the others `sample_ratio`. Raises ConfigError without the extra."""
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

            from .spans import SpanWriter
        except ImportError as exc:
            raise ConfigError(
                "otlp_endpoint: traces need OpenTelemetry, which is not installed:"
                f" pip install 'bear-grpc[otel]' ({exc.name} is missing)"
            ) from exc
        own = Resource.create({"service.name": SERVICE, "service.version": __version__})
        self._provider: TracerProvider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(sample_ratio),
            resource=own.merge(OTELResourceDetector().detect()),  # OTEL_SERVICE_NAME and the like
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(
            endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=EXPORT_TIMEOUT_S
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=INTERVAL_MS))
        self.observer: CallObserver = SpanWriter(self._provider)

    async def close(self, timeout_s: float) -> None:
        """Sends what is left, for at most `timeout_s`; what is not taken until then is lost."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            try:
                self._provider.shutdown()
            finally:
                with contextlib.suppress(RuntimeError):  # the loop has not waited for us
                    loop.call_soon_threadsafe(sent.set)

        # No pool's thread: a process waits for those at its end, and OpenTelemetry knows no timeout here.
        threading.Thread(target=shut_down, name="traces", daemon=True).start()
        try:
            async with asyncio.timeout(timeout_s):
                await sent.wait()
        except TimeoutError:
            log.warning("the collector of traces did not take the last ones within %.1f s", timeout_s)
