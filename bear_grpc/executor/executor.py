"""The async face of one loaded model. Servicers await it and never see llama.cpp."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from ..errors import (
    BackendError,
    BearError,
    EngineStartFailed,
    ModelUnloaded,
    QueueFull,
    WorkerCrashed,
    from_record,
)
from ..input_limits import DEFAULT_LIMITS, InputLimits
from ..params import Constraint, GenerationInput, OutputParams, OverflowPolicy, SamplingParams, StopParams
from ..protocol import (
    Costs,
    Delta,
    Ended,
    Failed,
    Finished,
    Load,
    Prefilled,
    Progress,
    Ready,
    SequenceEvent,
    Started,
    Step,
    Submit,
    TextJob,
    TextResult,
    ToServer,
)
from ..types import CostTable, EngineStats, LoadOptions
from .generation import Generation
from .link import WorkerLink
from .share import CpuShare
from .spawner import Spawner

log = logging.getLogger(__name__)

DEFAULT_OUTPUT = OutputParams()


class ExecutorLimits(msgspec.Struct, frozen=True):
    """What one model's executor may do. `step_target_s` 0: chosen by the worker."""

    max_waiting: int = 512
    stall_timeout_s: float = 30.0
    step_target_s: float = 0.0
    share_prefixes: bool = True
    input: InputLimits = DEFAULT_LIMITS


class ModelExecutor:
    """One worker process: load it, generate, ask for tokens, end it. Event loop only.

    Every call that waits ends: with its answer, with the worker's error, with
    WorkerCrashed when the process dies, or with ModelUnloaded.
    """

    def __init__(
        self,
        name: str,
        *,
        spawner: Spawner,
        share: CpuShare,
        limits: ExecutorLimits,
        on_progress: Callable[[Progress], None],
        on_costs: Callable[[list[CostTable]], None],
        on_crash: Callable[[str], None],
    ) -> None:
        """`on_costs` gets what has been measured; `on_crash` is called once if the process
        ends unasked after it was ready."""
        self.name = name
        self.stats = EngineStats()
        self._spawner = spawner
        self._share = share
        self._limits = limits
        self._on_progress = on_progress
        self._on_costs = on_costs
        self._on_crash = on_crash
        self._next_id = 1
        # By the ids of their sequences, as long as these run or wait.
        self._generations: dict[int, Generation] = {}
        self._texts: dict[int, asyncio.Future[TextResult]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._link: WorkerLink | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._refusing = False  # takes nothing new
        self._stopping = False  # its end is asked for: whatever ends it is no crash

    @property
    def pid(self) -> int:
        """The worker's process id, 0 before it is started."""
        return self._link.process.pid if self._link is not None else 0

    @property
    def memory_bytes(self) -> int:
        """What the worker's process holds; 0 where the system does not tell."""
        return self._link.process.memory_bytes() if self._link is not None else 0

    @property
    def in_flight(self) -> int:
        """Sequences that have not ended."""
        return len(self._generations)

    @property
    def requests_in_flight(self) -> int:
        """Generations that have not ended, each with one or more sequences."""
        return len(set(self._generations.values()))

    async def load(
        self,
        path: Path,
        options: LoadOptions,
        cores: int,
        costs: Sequence[CostTable] = (),
        chat_template: str | None = None,
    ) -> Ready:
        """Starts the worker and loads the model. On any error the worker is gone.

        `chat_template` takes the place of the file's own.

        Raises what the worker says (ModelFileInvalid, InvalidField, …) or
        EngineStartFailed when it dies before it is ready.
        """
        self._ready = asyncio.get_running_loop().create_future()
        try:
            self._link = await WorkerLink.start(self.name, self._spawner, self._take, self._end)
            limits = self._limits
            frame = Load(
                self.name,
                str(path),
                options,
                cores,
                stall_timeout_s=limits.stall_timeout_s,
                step_target_s=limits.step_target_s,
                share_prefixes=limits.share_prefixes,
                max_text_job_s=limits.input.max_text_job_s,
                max_rendered_chars=limits.input.max_rendered_chars,
                cost_tables=list(costs),
                chat_template=chat_template,
            )
            self._link.send(frame)
            ready = await self._ready
        except OSError as exc:
            raise EngineStartFailed(f"the worker process could not be started ({exc.strerror})") from exc
        except BaseException:
            self._ready.cancel()
            await self.kill()
            raise
        self._share.join(self, self._link.send)
        return ready

    def generate(
        self,
        source: GenerationInput,
        sampling: SamplingParams,
        stop: StopParams,
        *,
        n: int = 1,
        output: OutputParams = DEFAULT_OUTPUT,
        constraint: Constraint | None = None,
        overflow: OverflowPolicy = OverflowPolicy.ERROR,
        scope: str = "",
        received_s: float | None = None,
    ) -> Generation:
        """Hands a request for `n` answers to the worker; the caller must `close` what it gets.

        Raises QueueFull, and ModelUnloaded while the worker is being ended.
        """
        link = self._live_link()
        waiting = len(self._generations) - self.stats.running
        # An empty queue takes any request, however many answers it asks for.
        if waiting > 0 and waiting + n > self._limits.max_waiting:
            raise QueueFull(self.name, self._limits.max_waiting)
        received = time.monotonic() if received_s is None else received_s
        generation = Generation(self._take_ids(n), received, link.send)
        submit = Submit(
            generation.ids.start,
            source,
            sampling,
            stop,
            received,
            n=n,
            output=output,
            constraint=constraint,
            overflow=overflow,
            scope=scope,
        )
        link.send(submit)
        self._generations.update(dict.fromkeys(generation.ids, generation))
        if self._idle.is_set():
            self._idle.clear()
            self._share.set_busy(self, True)
        return generation

    async def text(
        self,
        source: GenerationInput | None = None,
        *,
        token_ids: list[int] | None = None,
        include_pieces: bool = False,
        include_special: bool = False,
    ) -> TextResult:
        """The text thread's answer: tokens of `source`, or text of `token_ids`."""
        link = self._live_link()
        if len(self._texts) >= self._limits.max_waiting:
            raise QueueFull(self.name, self._limits.max_waiting)
        (id,) = self._take_ids(1)
        future: asyncio.Future[TextResult] = asyncio.get_running_loop().create_future()
        self._texts[id] = future
        try:
            link.send(TextJob(id, source, token_ids, include_pieces, include_special))
            result = await future
        finally:
            del self._texts[id]
        if result.error is not None:
            raise from_record(result.error)
        return result

    def cut_waiting(self, error: BearError) -> None:
        """Ends what has not begun with this error; nothing of it has reached a caller."""
        for generation in set(self._generations.values()):
            if not generation.has_begun:
                generation.abandon(error)

    async def drain(self, timeout_s: float) -> int:
        """Takes nothing new and waits for what runs; gives how many requests were left."""
        self._refusing = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
                if self._texts:
                    await asyncio.wait(self._texts.values())
        except TimeoutError:
            return self.requests_in_flight
        return 0

    async def stop(self) -> None:
        """Ends the worker; what still runs ends with ModelUnloaded."""
        self._stopping = True
        if self._link is not None:
            await self._link.stop()

    async def kill(self) -> None:
        """Ends the worker at once."""
        self._stopping = True
        if self._link is not None:
            self._link.process.kill()
            await self._link.gone.wait()

    def _take_ids(self, count: int) -> range:
        """Ids that follow each other and were never used for this worker."""
        ids = range(self._next_id, self._next_id + count)
        self._next_id = ids.stop
        return ids

    def _live_link(self) -> WorkerLink:
        if self._refusing or self._stopping or self._link is None:
            raise ModelUnloaded(self.name)
        return self._link

    def _take(self, frame: ToServer) -> None:
        match frame:
            case Step():
                if frame.stats is not None:
                    self.stats = frame.stats
                for event in frame.events:
                    self._take_event(event)
            case TextResult():
                future = self._texts.get(frame.id)
                if future is not None and not future.done():
                    future.set_result(frame)
            case Progress():
                self._on_progress(frame)
            case Costs():
                self._on_costs(frame.tables)
            case Ready() if self._ready is not None and not self._ready.done():
                self._ready.set_result(frame)
            case Failed() if self._ready is not None and not self._ready.done():
                self._ready.set_exception(from_record(frame.error))

    def _take_event(self, event: SequenceEvent) -> None:
        generation = self._generations.get(event.id)
        if generation is None:
            return
        match event:
            case Started() | Prefilled() | Delta():
                generation.push(event)
            case Finished():
                generation.push(event)
                self._forget(event.id)
            case Ended():
                # After a cancel of ours this changes nothing: the generation has ended already.
                generation.fail(self._error_of(event), event.id)
                self._forget(event.id)

    def _error_of(self, event: Ended) -> BearError:
        if event.error is not None:
            return from_record(event.error)
        return ModelUnloaded(self.name) if self._stopping else BackendError("the worker gave it up")

    def _forget(self, id: int) -> None:
        del self._generations[id]
        if not self._generations:
            self._idle.set()
            self._share.set_busy(self, False)

    def _end(self, how: str) -> None:
        """The worker is gone: every waiter gets its ending."""
        self._share.leave(self)
        asked = self._stopping
        self._stopping = True
        error: BearError = ModelUnloaded(self.name) if asked else WorkerCrashed(self.name, how)
        for id, generation in list(self._generations.items()):
            generation.fail(error, id)
            self._forget(id)
        for future in self._texts.values():
            if not future.done():
                future.set_exception(error)
        if self._ready is not None and not self._ready.done():
            words = self._link.last_words if self._link is not None else ""
            cause = f"the worker ended while loading ({how})" + (f": {words}" if words else "")
            self._ready.set_exception(EngineStartFailed(cause))
        elif not asked:
            log.error("worker %s ended unexpectedly: %s", self.name, how)
            self._on_crash(how)
