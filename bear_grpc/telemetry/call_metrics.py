"""Calls and generations, counted as they run and end."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..rpc.call import Call
from . import families
from .series import Distribution, Distributions, Numbers, Taken

GENERATIONS = ("Generate", "GenerateOnce")
# More models than anybody loads; what comes beyond is counted as one.
MAX_MODELS = 500
OTHER = "other"


class CallMetrics:
    """A CallObserver. `name_of` gives the name of a known model, by what a request says; else None."""

    def __init__(self, name_of: Callable[[str], str | None]) -> None:
        self._name_of = name_of
        self._models: set[str] = set()
        self._in_flight = Numbers(families.RPC_IN_FLIGHT)
        self._calls = Numbers(families.RPC_CALLS)
        self._stalls = Numbers(families.RPC_WRITE_STALL)
        self._tokens = Numbers(families.TOKENS)
        self._answers = Numbers(families.ANSWERS)
        self._first = Distributions(families.TIME_TO_FIRST_TOKEN)
        self._per_token = Distributions(families.TIME_PER_OUTPUT_TOKEN)
        self._duration = Distributions(families.REQUEST_DURATION)
        self._usage = Distributions(families.TOKEN_USAGE)
        self._gap = Distributions(families.INTER_TOKEN_GAP)
        self._queue = Distributions(families.QUEUE)
        self._prefill = Distributions(families.PREFILL_RATE)
        self._decode = Distributions(families.DECODE_RATE)
        self._of_gen_ai = (self._first, self._per_token, self._duration, self._usage)
        self._of_model = (self._tokens, self._answers, self._gap, self._queue, self._prefill, self._decode)

    def begin(self, call: Call) -> None:
        """It is in flight."""
        service, method = service_and_method(call)
        self._in_flight.add(service, method)
        if method in GENERATIONS:
            call.on_delta = _Pace(self, call, call.on_delta)

    def end(self, call: Call) -> None:
        """Counts all that it was."""
        service, method = service_and_method(call)
        self._in_flight.add(service, method, by=-1)
        self._calls.add(service, method, call.code, call.reason)
        if call.stalled_s:
            self._stalls.add(service, method, by=call.stalled_s)
        if method in GENERATIONS:
            model = self.model_of(call)
            if model is not None:
                self._end_generation(call, model)

    def begin_text(self, call: Call, now_s: float) -> Distribution | None:
        """The first piece of text has come; gives where the gaps after it belong."""
        model = self.model_of(call)
        if model is None:
            return None
        self._first.of(*_gen_ai(call, model)).observe(now_s - call.began_s)
        return self._gap.of(model)

    def model_of(self, call: Call) -> str | None:
        """The label of its model; None if that is none of ours."""
        name = self._name_of(call.model) if call.model else None
        if name is None or name in self._models:
            return name
        if len(self._models) >= MAX_MODELS:
            return OTHER
        self._models.add(name)
        return name

    def forget(self, model: str) -> None:
        """The model is known no more: nor are its numbers."""
        if model in self._models:
            self._models.discard(model)
            for series in self._of_gen_ai:
                series.forget("gen_ai_request_model", model)
            for counted in self._of_model:
                counted.forget("model", model)

    def taken(self) -> list[Taken]:
        """All numbers of this moment."""
        others = (self._calls, self._in_flight, self._stalls)
        return [series.taken() for series in (*others, *self._of_gen_ai, *self._of_model)]

    def _end_generation(self, call: Call, model: str) -> None:
        labels, usage, timings = _gen_ai(call, model), call.usage, call.timings
        error = "" if call.code == "OK" else call.code
        self._duration.of(*labels, error).observe(call.ended_s - call.began_s)
        for reason in call.finish_reasons:
            self._answers.add(model, reason.value)
        if usage.prompt_tokens:
            self._tokens.add(model, "prompt", by=usage.prompt_tokens)
            self._tokens.add(model, "cached", by=usage.cached_tokens)
            self._tokens.add(model, "completion", by=call.drawn_tokens)
        if error or timings is None:
            return
        self._usage.of(*labels, "input").observe(usage.prompt_tokens)
        self._usage.of(*labels, "output").observe(usage.completion_tokens)
        self._queue.of(model).observe(timings.queue_s)
        computed = usage.prompt_tokens - usage.cached_tokens
        if computed > 0 and timings.prefill_s > 0:
            self._prefill.of(model).observe(computed / timings.prefill_s)
        # The timings are of the answer that ended last, the tokens of all.
        later = usage.completion_tokens / max(1, len(call.finish_reasons)) - 1
        if later > 0 and timings.decode_s > 0:
            self._decode.of(model).observe(later / timings.decode_s)
            self._per_token.of(*labels).observe(timings.decode_s / later)


class _Pace:
    """Measures from one piece of text of a call to the next."""

    __slots__ = ("_call", "_gaps", "_last_s", "_metrics", "_next")

    def __init__(self, metrics: CallMetrics, call: Call, following: Callable[[int], None] | None) -> None:
        self._metrics = metrics
        self._call = call
        self._next = following
        self._last_s = 0.0
        self._gaps: Distribution | None = None

    def __call__(self, tokens: int) -> None:
        now_s = time.monotonic()
        if not self._last_s:
            self._gaps = self._metrics.begin_text(self._call, now_s)
        elif self._gaps is not None:
            self._gaps.observe(now_s - self._last_s)
        self._last_s = now_s
        if self._next is not None:
            self._next(tokens)


def service_and_method(call: Call) -> tuple[str, str]:
    """Of `/package.Service/Method`. Only methods that are served come here: their number is bounded."""
    service, _, method = call.method.lstrip("/").partition("/")
    return service, method


def _gen_ai(call: Call, model: str) -> tuple[str, str, str]:
    return call.operation, families.PROVIDER, model
