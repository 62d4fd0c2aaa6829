"""The load in the contract's words, and how many generations there are per second."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import NamedTuple

from ..access.caller import Caller
from ..errors import InvalidField
from ..models.load import ModelLoad, ServerLoad
from ..v1 import server_service_pb2 as pb
from .call import Call
from .status import SERVER_FAULTS

DEFAULT_INTERVAL_S = 1.0
INTERVALS_S = (0.1, 60.0)
WINDOW_S = 30
QUEUE_FULL = "QUEUE_FULL"


class PerSecond(NamedTuple):
    """Generations per second over the last WINDOW_S."""

    ended: float
    failed: float


class GenerationRate:
    """A call observer that counts the generations that end, by the second. Event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that never go back."""
        self._clock = clock
        self._began_s = clock()
        # Second, generations, failures; at most WINDOW_S of them.
        self._seconds: collections.deque[list[int]] = collections.deque()

    def begin(self, call: Call) -> None:
        """Nothing: what comes of it is not known."""

    def end(self, call: Call) -> None:
        """Counts a generation that a worker took up, or that the server failed to serve."""
        failed = call.code in SERVER_FAULTS or call.reason == QUEUE_FULL
        if not call.operation or not (call.started_s or failed):
            return
        second = self._forget()
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0, 0])
        self._seconds[-1][1] += 1
        self._seconds[-1][2] += failed

    def read(self) -> PerSecond:
        """The rates up to now."""
        self._forget()
        elapsed_s = min(WINDOW_S, max(1.0, self._clock() - self._began_s))
        ended, failed = (sum(second[place] for second in self._seconds) for place in (1, 2))
        return PerSecond(ended / elapsed_s, failed / elapsed_s)

    def _forget(self) -> int:
        second = int(self._clock())
        while self._seconds and self._seconds[0][0] <= second - WINDOW_S:
            self._seconds.popleft()
        return second


def interval_of(request: pb.WatchLoadRequest) -> float:
    """Seconds between two readings. Raises InvalidField."""
    if not request.HasField("interval"):
        return DEFAULT_INTERVAL_S
    seconds: float = request.interval.seconds + request.interval.nanos / 1e9
    least, most = INTERVALS_S
    if not least <= seconds <= most:
        raise InvalidField("interval", f"must be {least:g} to {most:g} s, is {seconds:g} s")
    return seconds


def load_to_proto(load: ServerLoad, rate: PerSecond, caller: Caller) -> pb.ServerLoad:
    """Sums of all models, and those that the caller may know of."""
    models = load.models
    return pb.ServerLoad(
        running_count=sum(model.running for model in models),
        waiting_count=sum(model.waiting for model in models),
        waiting_token_count=sum(model.waiting_tokens for model in models),
        slot_count=sum(model.slots for model in models),
        kv_cache_used_token_count=sum(model.kv_used_tokens for model in models),
        kv_cache_idle_token_count=sum(model.kv_idle_tokens for model in models),
        kv_cache_token_count=sum(model.kv_tokens for model in models),
        prefill_tokens_per_second=sum(model.prefill_rate for model in models),
        tokens_per_second=sum(model.decode_rate for model in models),
        requests_per_second=rate.ended,
        memory_bytes=sum(model.memory_bytes for model in models),
        utilization=load.utilization,
        models=[model_load_to_proto(model) for model in models if caller.may_use(model.name)],
    )


def model_load_to_proto(model: ModelLoad) -> pb.ModelLoad:
    return pb.ModelLoad(
        name=model.name,
        running_count=model.running,
        waiting_count=model.waiting,
        waiting_token_count=model.waiting_tokens,
        slot_count=model.slots,
        kv_cache_used_token_count=model.kv_used_tokens,
        kv_cache_idle_token_count=model.kv_idle_tokens,
        kv_cache_token_count=model.kv_tokens,
        prefill_tokens_per_second=model.prefill_rate,
        decode_tokens_per_second=model.decode_rate,
        memory_bytes=model.memory_bytes,
        utilization=model.utilization,
    )
