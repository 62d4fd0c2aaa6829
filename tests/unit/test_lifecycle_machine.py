"""The life of models in every order of events: no state is reached by a way that does not exist, nobody
waits for ever, and no model that is needed is taken away."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bear_grpc.errors import BackendError, BearError, EngineStartFailed, HubUnreachable, ModelFileInvalid
from bear_grpc.models.entry import ModelEntry, ModelStatus
from bear_grpc.models.transitions import TRANSITIONS, WITH_EXECUTOR, WITH_READY
from bear_grpc.types import LoadOptions, ModelState
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.lifecycle import FakeExecutor, Host, World
from tests.helpers.lifecycle_machine import InlinePool, Reasons, Request

NAMES = ["a", "b", "c"]
REMOTE = "owner/repo:Q4"
MODELS = st.sampled_from([*NAMES, REMOTE])
KEEP_ALIVE = st.sampled_from([None, -1.0, 0.0, 1.0, 60.0])
ROOM = 2  # models that the memory holds
TURNS = 60  # of the loop, more than any chain of callbacks is long


class Life(RuleBasedStateMachine):
    """Every rule ends when nothing more happens by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(InlinePool())
        self.model = write_tiny_llama(Path(self.folder.name) / "model.gguf")
        self.reasons = Reasons()
        self.log = logging.getLogger("bear_grpc.models.unloads")
        self.level = self.log.level
        self.log.setLevel(logging.INFO)
        self.log.addHandler(self.reasons)
        self.requests: list[Request] = []
        self.calls: list[asyncio.Task[Any]] = []
        self.fetches: list[asyncio.Future[None]] = []
        self.states: dict[str, ModelState] = {}
        self.asked_to_go: set[str] = set()
        self.broken: list[str] = []
        # What an idle model's time is, as this test counts it; None: it waits for its first use.
        self.time_s: dict[str, float | None] = {}

    @initialize()
    def start(self) -> None:
        self.run(self._start())

    async def _start(self) -> None:
        host = Host(ROOM)
        host.world = self.world = World(
            Path(self.folder.name), self.model, plan=host.plan, ensure_file=self._fetch, keep_alive_s=60.0
        )
        for name in NAMES:
            self.states[name] = (await self.world.add(name)).state
        self.world.shelf.feed.listen(self._on_change)

    def run(self, call: Any = None) -> None:
        async def work() -> None:
            if call is not None:
                await call
            for _ in range(TURNS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(work())

    def entry(self, name: str) -> ModelEntry | None:
        return self.world.shelf.find(name)

    def live(self, name: str) -> list[Request]:
        """Requests that have not ended."""
        return [r for r in self.requests if r.name == name and r.task is not None and not r.task.done()]

    def loading(self) -> list[FakeExecutor]:
        return [executor for executor in self.world.executors if executor.is_loading]

    def _on_change(self, status: ModelStatus) -> None:
        before = self.states.get(status.name, ModelState.ABSENT)
        self.states[status.name] = status.state
        if status.state is before:
            return
        if status.state not in TRANSITIONS[before]:
            self.broken.append(f"{status.name}: {before} -> {status.state}")
        entry = self.entry(status.name)
        if status.state is ModelState.READY and entry is not None and not self.live(status.name):
            self.time_s[status.name] = entry.keep_alive_s or None
        if status.state is not ModelState.UNLOADING or status.name in self.asked_to_go:
            return
        why = self.reasons.last[status.name]
        if any(request.executor is not None for request in self.live(status.name)):
            self.broken.append(f"{status.name} was busy: {why}")
        if entry is not None and entry.pinned and "needs" in why:
            self.broken.append(f"{status.name} was pinned: {why}")

    async def _fetch(self, name: str) -> None:
        fetch: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.fetches.append(fetch)
        await fetch
        await self.world.add(name)

    async def _request(self, request: Request) -> None:
        ended = False
        try:
            async with self.world.request(request.name, request.keep_alive_s) as executor:
                request.executor = executor
                waits = [asyncio.ensure_future(e.wait()) for e in (request.release, executor.gone)]
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for wait in waits:
                        wait.cancel()
                request.executor = None
            ended = True
        except asyncio.CancelledError:
            ended = True
            raise
        except BearError as exc:
            ended = is_fair(exc)
        finally:
            request.executor = None
            request.endings += 1
            others = [other for other in self.live(request.name) if other is not request]
            entry = self.entry(request.name)
            if not others and entry is not None:
                own = entry.keep_alive_s if request.keep_alive_s is None else request.keep_alive_s
                self.time_s[request.name] = own
        if not ended:
            self.broken.append(f"a request for {request.name} ended otherwise")

    # ---- what may happen ----------------------------------------------------------------------------

    @rule(name=MODELS, keep_alive_s=KEEP_ALIVE)
    def begin_request(self, name: str, keep_alive_s: float | None) -> None:
        async def begin() -> None:
            request = Request(name, keep_alive_s)
            self.requests.append(request)
            request.task = asyncio.create_task(self._request(request))

        self.run(begin())

    @precondition(lambda self: any(self.live(name) for name in [*NAMES, REMOTE]))
    @rule(data=st.data(), cancelled=st.booleans())
    def end_request(self, data: st.DataObject, cancelled: bool) -> None:
        request = data.draw(st.sampled_from([r for n in [*NAMES, REMOTE] for r in self.live(n)]))

        async def end() -> None:
            if cancelled and request.task is not None:
                request.task.cancel()
            request.release.set()

        self.run(end())

    @rule(name=MODELS, keep_alive_s=KEEP_ALIVE, pinned=st.sampled_from([None, None, True, False]))
    def ask_to_load(self, name: str, keep_alive_s: float | None, pinned: bool | None) -> None:
        async def load() -> None:
            options = LoadOptions(keep_alive_s=keep_alive_s, pinned=pinned)
            self.calls.append(asyncio.create_task(self.world.manager.load(name, options)))

        self.run(load())
        entry = self.entry(name)
        if entry is not None and entry.is_ready and keep_alive_s is not None and not self.live(name):
            self.time_s[name] = keep_alive_s or None

    @rule(name=MODELS, drain_s=st.sampled_from([0.0, 30.0]))
    def ask_to_unload(self, name: str, drain_s: float) -> None:
        async def unload() -> None:
            self.asked_to_go.add(name)
            self.calls.append(asyncio.create_task(self.world.manager.unload(name, drain_s)))

        self.run(unload())
        self.asked_to_go -= {n for n in self.asked_to_go if self.states.get(n) is not ModelState.LOADING}

    @precondition(lambda self: self.loading())
    @rule(
        data=st.data(),
        error=st.sampled_from([None, None, EngineStartFailed("x"), ModelFileInvalid("m", "x")]),
    )
    def end_load(self, data: st.DataObject, error: BearError | None) -> None:
        executor = data.draw(st.sampled_from(self.loading()))

        async def end() -> None:
            executor.finish(1) if error is None else executor.fail(error)

        self.run(end())

    @precondition(lambda self: any(state is ModelState.READY for state in self.states.values()))
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([n for n, s in self.states.items() if s is ModelState.READY]))

        async def die() -> None:
            entry = self.entry(name)
            assert entry is not None and isinstance(entry.executor, FakeExecutor)
            entry.executor.crash()

        self.run(die())

    @precondition(lambda self: any(not fetch.done() for fetch in self.fetches))
    @rule(works=st.booleans())
    def end_fetch(self, works: bool) -> None:
        async def end() -> None:
            for fetch in [fetch for fetch in self.fetches if not fetch.done()]:
                fetch.set_result(None) if works else fetch.set_exception(HubUnreachable("x"))

        self.run(end())

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 30.0, 400.0]))
    def pass_time(self, seconds: float) -> None:
        async def advance() -> None:
            self.world.clock.advance(seconds)

        self.run(advance())

    # ---- what holds ---------------------------------------------------------------------------------

    @invariant()
    def states_are_reached_by_ways_that_exist_and_nobody_needed_is_taken(self) -> None:
        assert self.broken == []

    @invariant()
    def executors_are_where_they_belong(self) -> None:
        if self.states:
            for entry in self.world.shelf.list():
                assert (entry.executor is not None) == (entry.state in WITH_EXECUTOR)
                assert (entry.ready is not None) == (entry.state in WITH_READY)
                assert entry.expires is None or entry.is_ready

    @invariant()
    def memory_is_not_promised_twice(self) -> None:
        if self.states:
            loading = sum(executor.is_loading for executor in self.world.executors)
            assert loading + sum(executor.memory_bytes for executor in self.world.executors) <= ROOM

    @invariant()
    def requests_run_on_loaded_models_only(self) -> None:
        for request in self.requests:
            if request.executor is not None:
                assert self.states[request.name] in WITH_READY

    def teardown(self) -> None:
        try:
            if self.states:
                self._finish()
        finally:
            self.log.removeHandler(self.reasons)
            self.log.setLevel(self.level)
            self.loop.close()
            self.folder.cleanup()

    def _goes_on(self) -> bool:
        return ModelState.LOADING in self.states.values() or any(not fetch.done() for fetch in self.fetches)

    def _finish(self) -> None:
        """Lets all end: then every waiter has its one answer, and what is kept is kept for ever."""
        while self._goes_on():
            for executor in self.loading():
                self.run(_done(executor))
            self.end_fetch(True)
            if ModelState.LOADING in self.states.values():
                self.pass_time(30.0)  # a worker that has died is not started again at once
        for request in self.requests:
            request.release.set()
        self.run()
        while self._goes_on():
            for executor in self.loading():
                self.run(_done(executor))
            self.pass_time(30.0)
        assert [request.endings for request in self.requests] == [1] * len(self.requests)
        for task in [*self.calls, *(r.task for r in self.requests if r.task is not None)]:
            assert task.done()
            assert task.cancelled() or is_fair(task.exception())
        self.pass_time(1e6)
        for entry in self.world.shelf.list():
            time_s = self.time_s.get(entry.name)
            assert entry.state in (ModelState.READY, ModelState.AVAILABLE, ModelState.FAILED)
            assert not entry.is_ready or time_s is None or time_s < 0, f"{entry.name} is kept: {time_s}"
        self.states_are_reached_by_ways_that_exist_and_nobody_needed_is_taken()
        self.asked_to_go.update(self.states)
        self.run(self.world.manager.close())
        assert not any(entry.is_in_use for entry in self.world.shelf.list())


def is_fair(error: BaseException | None) -> bool:
    """Whether it is an ending that a caller may see: what nobody thought of is a BackendError itself."""
    return error is None or (isinstance(error, BearError) and type(error) is not BackendError)


async def _done(executor: FakeExecutor) -> None:
    if executor.is_loading:
        executor.finish(1)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40)
