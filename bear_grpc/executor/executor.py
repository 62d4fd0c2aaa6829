"""The async face of one loaded model. Servicers await it and never see llama.cpp."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import (
    BackendError,
    BearError,
    InvalidField,
    ModelUnloaded,
    RequestQuarantined,
    WorkerCrashed,
    from_record,
)
from ..framing import FrameError
from ..params import (
    Constraint,
    GenerationInput,
    OutputParams,
    OverflowPolicy,
    Priority,
    SamplingParams,
    StopParams,
)
from ..protocol import (
    Cancel,
    Costs,
    Delta,
    Ended,
    Finished,
    Frame,
    Load,
    Prefilled,
    Progress,
    Queued,
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
from .admission import Admission
from .crash import CrashReport
from .generation import Generation
from .limits import ExecutorLimits
from .process import WorkerProcess
from .rates import TokenRates
from .recovery import Recovery
from .share import CpuShare
from .spawner import Spawner
from .supervisor import Supervisor
from .texts import Texts

log = logging.getLogger(__name__)

DEFAULT_OUTPUT = OutputParams()


class ModelExecutor:
    """One model's worker process: load it, generate, ask for tokens, end it. Event loop only.

    When the process dies and is started again, requests go on. Every call that waits ends: with its
    answer, with the worker's error, with WorkerCrashed or RequestQuarantined, or with ModelUnloaded.
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
        on_crash: Callable[[str], bool],
    ) -> None:
        """`on_costs` gets what has been measured. `on_crash` is called with a report when the process ends
        unasked after it was ready, and tells whether `restart` will be called."""
        self.name = name
        self.stats = EngineStats()
        self.rates = TokenRates()
        self.deaths = 0  # unasked, since a request has finished last
        self._limits = limits
        self._on_progress = on_progress
        self._on_costs = on_costs
        self._on_crash = on_crash
        self._next_id = 1
        # By the ids of their sequences, as long as these run or wait.
        self._generations: dict[int, Generation] = {}
        self._admission = Admission(name, limits.max_waiting)
        self._texts = Texts(name, limits.max_waiting)
        self._recovery = Recovery(name, limits.max_restarts)
        self._load: Load | None = None
        self._supervisor = Supervisor(
            name,
            spawner=spawner,
            share=share,
            heartbeat_timeout_s=limits.heartbeat_timeout_s,
            startup_timeout_s=limits.startup_timeout_s,
            on_frame=self._take,
            on_end=self._end,
        )
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusing = False  # takes nothing new
        self._stopping = False  # its end is asked for: whatever ends it is no crash

    @property
    def pid(self) -> int:
        """The worker's process id, 0 while there is none."""
        return self._supervisor.pid

    @property
    def memory_bytes(self) -> int:
        """What the worker's process holds; 0 where the system does not tell. Any thread; it takes a while."""
        return self._supervisor.memory_bytes

    @property
    def left(self) -> tuple[WorkerProcess, ...]:
        """Workers of before, which not even SIGKILL has ended yet."""
        return self._supervisor.left

    @property
    def in_flight(self) -> int:
        """Sequences that have not ended."""
        return len(self._generations)

    @property
    def requests_in_flight(self) -> int:
        """Generations that have not ended, each with one or more sequences."""
        return len(set(self._generations.values()))

    def set_max_waiting(self, count: int) -> None:
        """Bounds what waits from now on; what waits already stays."""
        self._admission.limit = self._texts.admission.limit = count

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
        self._load = self._limits.load(self.name, path, options, cores, costs, chat_template)
        try:
            return await self.restart()
        except BaseException:
            self._stopping = True
            raise

    async def restart(self) -> Ready:
        """Loads the model as before, in a new worker, which goes on with what the last one had.

        On any error the new worker is gone, and the requests still wait. Raises as `load`.
        """
        assert self._load is not None
        ready = await self._supervisor.start(self._load)
        self._send_all([*self._texts.jobs(), *self._recovery.open()])
        self._supervisor.set_busy(bool(self._generations))
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
        tenant: str = "",
        tag: str = "",
        priority: Priority = Priority.NORMAL,
        received_s: float | None = None,
        deadline_s: float = 0.0,
        fail_on_restart: bool = False,
    ) -> Generation:
        """Hands a request for `n` answers to the worker; the caller must `close` what it gets.

        `deadline_s` is CLOCK_MONOTONIC, 0 for none. Slots and steps are shared between `tenant`s.
        With `fail_on_restart` it ends with WorkerCrashed when the worker dies, else it goes on in the next.

        Raises QueueFull, and ModelUnloaded while the worker is being ended.
        """
        self._check_open()
        # While there is no worker all of them wait: each needs a slot of the next one.
        waiting = len(self._generations) - self.stats.running
        held = (each.tenant for each in self._generations.values())
        self._admission.check(waiting, n, tenant, lambda: Counter(held))
        received = time.monotonic() if received_s is None else received_s
        generation = Generation(self._take_ids(n), received, self._send, tenant)
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
            tenant=tenant,
            tag=tag,
            priority=priority,
            deadline_s=deadline_s,
        )
        self._generations.update(dict.fromkeys(generation.ids, generation))
        self._send_all(self._recovery.add(generation, submit, fail_on_restart=fail_on_restart))
        if output.queue_progress and not self._recovery.is_sent(generation):
            # One that is suspected of ending workers runs alone, the others wait.
            position = self.requests_in_flight - 1 - min(1, self.stats.running)
            generation.push(Queued(generation.ids.start, position))
        if self._idle.is_set():
            self._idle.clear()
            self._supervisor.set_busy(True)
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
        self._check_open()
        (id,) = self._take_ids(1)
        job = TextJob(id, source, token_ids, include_pieces, include_special)
        future = self._texts.add(job)
        try:
            self._send(job)
            result = await future
        finally:
            self._texts.remove(job)
        if result.error is not None:
            raise from_record(result.error)
        return result

    def cut_waiting(self, error: BearError) -> int:
        """Ends what has not begun with this error; nothing of it has reached a caller. Gives how many."""
        waiting = [g for g in set(self._generations.values()) if not (g.has_started or g.ended)]
        for generation in waiting:
            generation.abandon(error)
        return len(waiting)

    async def drain(self, timeout_s: float) -> int:
        """Takes nothing new and waits for what runs; gives how many requests were cut off by the time."""
        self._refusing = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
                await self._texts.settle()
        except TimeoutError:
            return len({g for g in self._generations.values() if not g.ended})
        return 0

    async def stop(self) -> None:
        """Ends the worker; what still runs or waits ends with ModelUnloaded."""
        self._stopping = True
        await self._supervisor.stop()
        self.give_up(ModelUnloaded(self.name))

    def give_up(self, error: BearError) -> None:
        """There will be no other worker: what runs or waits ends with `error`."""
        self._stopping = True
        for generation in list(dict.fromkeys(self._generations.values())):
            self._end_generation(generation, error)
        self._texts.fail(error)

    def _take_ids(self, count: int) -> range:
        """Ids that follow each other and were never used for this model's workers."""
        ids = range(self._next_id, self._next_id + count)
        self._next_id = ids.stop
        return ids

    def _check_open(self) -> None:
        if self._refusing or self._stopping or self._load is None:
            raise ModelUnloaded(self.name)

    def _send(self, frame: Frame) -> None:
        """To the worker; what is lost while there is none is told to the next one by `Submit`."""
        if isinstance(frame, Cancel):
            generation = self._generations.get(frame.id)
            if generation is None or not self._recovery.is_sent(generation):
                self._forget(frame.id)  # no worker knows it: nothing follows
                return
        self._supervisor.send(frame)

    def _send_all(self, frames: Iterable[Submit | TextJob]) -> None:
        for frame in frames:
            try:
                self._send(frame)
            except FrameError:
                generation = self._generations.get(frame.id)
                if generation is not None:
                    self._end_generation(generation, InvalidField("input", "is too long"))

    def _take(self, frame: ToServer) -> None:
        match frame:
            case Step():
                if frame.stats is not None:
                    before, self.stats = self.stats, frame.stats
                    left = self.stats.left_queue - before.left_queue
                    self._admission.outflow.add(left, self.stats.queue_s - before.queue_s)
                    self.rates.add(frame.stats.prefill_tokens, frame.stats.decode_tokens)
                for event in frame.events:
                    self._take_event(event)
            case TextResult():
                self._texts.take(frame)
            case Progress():
                self._on_progress(frame)
            case Costs():
                self._on_costs(frame.tables)

    def _take_event(self, event: SequenceEvent) -> None:
        generation = self._generations.get(event.id)
        if generation is None:
            return
        match event:
            case Delta() | Queued() | Started() | Prefilled():
                generation.push(event)
            case Finished():
                self.deaths = 0
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

    def _end_generation(self, generation: Generation, error: BearError) -> None:
        """Without a word of the worker's."""
        generation.fail(error, generation.ids.start)
        for id in generation.ids:
            self._forget(id)

    def _forget(self, id: int) -> None:
        """An answer has ended; others may have waited for it."""
        generation = self._generations.pop(id, None)
        if generation is None:
            return
        if not any(other in self._generations for other in generation.ids):
            self._send_all(self._recovery.remove(generation))
        if not self._generations:
            self._idle.set()
            self._supervisor.set_busy(False)

    def _end(self, report: CrashReport) -> None:
        """The worker is gone, as `report` tells: every waiter gets its ending, or waits for the next one."""
        self.stats = EngineStats()
        self.rates.restart()
        if self._stopping:
            self.give_up(ModelUnloaded(self.name))
            return
        log.error("worker %s: %s", self.name, report.describe())
        self.deaths += 1
        ends = self._recovery.close(report)
        self._texts.close(report)
        if any(isinstance(error, RequestQuarantined) for _, error in ends):
            self.deaths = 0  # its cause is found
        crashed = WorkerCrashed(self.name, report.cause)
        for generation, error in ends:
            self._end_generation(generation, error)
        for generation in [g for g in self._generations.values() if g.ended]:
            self._end_generation(generation, crashed)  # cancelled: no worker will say so
        if not self._on_crash(report.describe()):
            self.give_up(crashed)
