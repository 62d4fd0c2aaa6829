"""The benchmarks' pure parts: what is asked, what is made of the answers, how it is judged and told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest

from bear_grpc.v1.types_pb2 import EngineCounters, ModelStatus
from benchmarks import asks, report, servers, sides
from benchmarks.asks import Answer, Ask, Prompts
from benchmarks.bars import all_bars, cancel, overhead, stall, storm
from benchmarks.crowd import Crowd, Event, _server_sent
from benchmarks.measure import Curve, Plan, Row, Series, at_most_of, percentile


def answer(*times: float, asked: float = 0.0, tokens: int = 0) -> Answer:
    return Answer(asked_s=asked, times=list(times), ended_s=times[-1], completed=True, tokens=tokens)


def test_prompts_same_seed_gives_the_same_and_another_seed_others():
    first, same, other = Prompts(1, 2), Prompts(1, 2), Prompts(1, 3)
    prompt = first.take(64)
    assert prompt == same.take(64)
    assert prompt != other.take(64)
    assert prompt != first.take(64)


def test_prompts_hold_one_bos_and_plain_tokens_after_it():
    prompt = Prompts(0).take(2000)
    assert len(prompt) == 2000
    assert prompt[0] == asks.BOS
    assert min(prompt[1:]) >= asks.FIRST_PLAIN
    assert max(prompt[1:]) < asks.N_VOCAB


def test_rate_counts_all_tokens_from_the_first_ask_to_the_last_end():
    answers = [answer(2.0, 4.0, asked=1.0, tokens=10), answer(3.0, 6.0, asked=2.0, tokens=20)]
    assert asks.wall_s(answers) == 5.0
    assert asks.rate(answers) == 6.0


def test_longest_gap_counts_a_pause_that_reaches_into_the_window_and_none_outside():
    streams = [answer(0.0, 5.0, 6.0, 20.0, 29.0), answer(1.0, 2.0, 3.0)]
    assert asks.longest_gap_s(streams, 4.0, 6.0) == 5.0
    assert asks.longest_gap_s(streams, 5.0, 6.0) == 1.0
    assert asks.longest_gap_s([streams[1]], 4.0, 6.0) == 0.0


def test_percentile_is_the_nearest_rank():
    values = [float(value) for value in range(200, 0, -1)]
    assert percentile(values, 99) == 198
    assert percentile(values, 50) == 100
    assert percentile([7.0], 99) == 7.0
    assert percentile([1.0, 2.0], 100) == 2.0


@pytest.mark.parametrize(("ours", "holds"), [(5.0, True), (5.1, False)])
def test_at_most_of_is_held_against_the_peers_median(ours, holds):
    assert at_most_of(Series([ours]), Series([1.0, 10.0, 100.0]), 0.5).holds is holds


def test_stall_figures_judge_the_time_until_the_long_prompts_first_token():
    long = answer(14.0, 15.0, asked=10.0)
    streams = [answer(9.5, 10.5, 13.5, 13.9, 29.0), answer(1.0, 9.9, 10.4, 11.0)]
    figures = stall.figures_of(streams, long)
    assert figures.ttft_s == 4.0
    # The pause from 13.9 to 29 begins inside, but it is no pause before 9 that the other one has.
    assert figures.longest_gap_s == pytest.approx(15.1)
    assert [round(end, 3) for end, _ in figures.pauses] == [-0.1, 0.4, 0.5, 1.0, 3.5, 3.9, 19.0]


def test_cancel_figures_take_the_slot_from_started_and_leave_out_what_ended_before():
    stopped = answer(0.1, 0.2, 0.3)
    stopped.completed, stopped.cancelled_s = False, 0.35
    waiting = answer(0.5)
    waiting.started_s = 0.4
    ended, after = answer(0.6, 0.7), answer(0.8)
    figures = cancel.figures_of([stopped, waiting, ended, after])
    assert figures.slot == pytest.approx([50.0])
    assert figures.first == pytest.approx([150.0])
    assert figures.steps == pytest.approx([100.0])


@pytest.mark.parametrize("build", [cancel.in_decode, lambda *a: cancel.in_prefill(*a, 1.0)])
def test_cancel_asks_are_pairs_of_which_one_is_cancelled_and_wait_for_earlier_ones_only(build):
    pairs = build("m", Prompts(0), 5)
    assert len(pairs) == 10
    assert all(ask.cancel_s is not None for ask in pairs[::2])
    assert all(ask.cancel_s is None for ask in pairs[1::2])
    assert all(other < index for index, ask in enumerate(pairs) for other in ask.after)


def test_storm_asks_cancel_every_second_one():
    planned = storm.storm(100, Prompts(0))
    assert [ask.cancel_s is not None for ask in planned] == [False, True] * 50
    assert any(ask.cancel_tokens for ask in planned)
    assert any(ask.cancel_s and not ask.cancel_tokens for ask in planned)


def test_storm_wrong_ends_are_short_ones_and_those_that_nobody_cancelled():
    asked = [Ask([1], 4)] * 4
    short, whole, stopped, lost = (
        answer(1.0, tokens=3),
        answer(1.0, tokens=4),
        Answer(cancelled_s=1.0),
        Answer(),
    )
    assert storm.wrong_ends(asked, [short, whole, stopped, lost]) == 2


def test_overhead_is_a_part_of_what_the_counters_grew_by():
    before = EngineCounters(step_count=5, forward_seconds=1.0, sampling_seconds=1.0, overhead_seconds=1.0)
    after = EngineCounters(step_count=15, forward_seconds=1.9, sampling_seconds=1.09, overhead_seconds=1.01)
    steps = overhead.grown(before, after)
    assert steps.count == 10
    assert steps.overhead_percent == pytest.approx(1.0)


def test_held_tokens_leave_out_kept_prefixes():
    assert servers.held_tokens(ModelStatus(kv_cache_used_token_count=9, kv_cache_idle_token_count=7)) == 2


def test_in_turn_alternates_and_repeats_with_prompts_that_no_server_has_seen():
    class Noisy(Plan):
        def undisturbed(self, measure):
            measure()
            return measure()

    seen: list[tuple[str, tuple[int, ...]]] = []

    def measure(side: sides.Side, prompts: Prompts) -> int:
        seen.append((side.name, tuple(prompts.take(16))))
        return len(seen)

    both = [sides.Side("", "", "m", True), sides.Side("peer", "", "m", True)]
    found = sides.in_turn(Noisy(), "test", both, 2, measure)
    assert found == {"": [2, 6], "peer": [4, 8]}
    own, other = ([prompt for name, prompt in seen if name == side.name] for side in both)
    assert own == other
    assert len(set(own)) == 4


def test_bars_have_names_of_their_own_and_titles_of_one_line():
    bars = all_bars()
    assert {"one-stream", "ttft", "streams", "prefix", "stall", "cancel", "micro", "overhead"} <= bars.keys()
    assert {"load", "two-models", "storm", "soak"} <= bars.keys()
    assert all(bar.title.endswith(".") or bar.title.endswith(":") for bar in bars.values())


def test_report_json_holds_rows_and_curves(tmp_path):
    row = Row("b", "w", "s", Series([1.0, 3.0]), "p", Series([4.0]))
    report.write_json(tmp_path / "r.json", {"machine": "m"}, [row], [Curve("streams", "c", [(1, 0.123456)])])
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["machine"] == "m"
    assert content["rows"][0]["ratio"] == 0.5
    assert content["curves"] == [{"picture": "streams", "name": "c", "points": [[1, 0.1235]]}]


@pytest.mark.parametrize("cut", [1, 7, 23, 1000])
async def test_server_sent_events_do_not_depend_on_where_chunks_end(cut):
    body = b'data: {"content":"a"}\n\ndata: {"content":"b\\n"}\n\nerror: {"error":1}\n\ndata: [DONE]\n\n'
    reader = asyncio.StreamReader()
    reader.feed_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for start in range(0, len(body), cut):
        part = body[start : start + cut]
        reader.feed_data(b"%x\r\n%s\r\n" % (len(part), part))
    reader.feed_data(b"0\r\n\r\n")
    reader.feed_eof()
    found = [json.loads(event) async for event in _server_sent(reader)]
    assert found == [{"content": "a"}, {"content": "b\n"}, {"error": 1}]


class FakeServer:
    """Answers asks by their prompt: [n] gives n pieces and ends, [0] gives one and never ends."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.running = self.most = 0

    async def connect(self, ask: Ask, stack: object):
        return lambda: self._events(ask)

    async def _events(self, ask: Ask) -> AsyncGenerator[Event, None]:
        self.log.append(f"{ask.model} sent")
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield Event(started=True)
            for piece in range(ask.prompt[0] or 1):
                await asyncio.sleep(0)
                self.log.append(f"{ask.model} {piece + 1}")
                yield Event(text="x")
            if not ask.prompt[0]:
                await asyncio.Event().wait()
            yield Event(completed=True, tokens=ask.prompt[0], cached_tokens=3)
        finally:
            self.running -= 1
            self.log.append(f"{ask.model} left")


async def test_crowd_answer_tells_what_came():
    [found] = await Crowd([Ask([3], 3, "a")], FakeServer().connect).play(0)
    assert (found.text, len(found.times), found.tokens, found.cached_tokens) == ("xxx", 3, 3, 3)
    assert found.completed
    assert found.cancelled_s is None
    assert found.started_s is not None
    assert found.asked_s <= found.started_s <= found.times[0] <= found.times[-1] <= found.ended_s


async def test_crowd_ask_after_others_waits_for_their_text_or_for_their_end():
    server = FakeServer()
    script = [Ask([3], 3, "a"), Ask([1], 1, "b", after=[0], after_tokens=2), Ask([1], 1, "c", after=[0, 1])]
    await Crowd(script, server.connect).play(0)
    at = server.log.index
    assert at("b sent") > at("a 2")
    assert at("c sent") > max(at("a left"), at("b left"))


async def test_crowd_ask_after_text_that_never_comes_starts_when_the_other_has_ended():
    server = FakeServer()
    script = [Ask([1], 1, "a"), Ask([1], 1, "b", after=[0], after_tokens=5)]
    answers = await asyncio.wait_for(Crowd(script, server.connect).play(0), 5)
    assert answers[1].completed
    assert server.log.index("b sent") > server.log.index("a left")


@pytest.mark.parametrize("how", [{"cancel_tokens": 1}, {"cancel_s": 0.0}, {"cancel_with": 1}])
async def test_crowd_cancel_leaves_the_call_and_lets_the_others_end(how):
    server = FakeServer()
    script = [Ask([0], 9, "a", **how), Ask([4], 4, "b")]
    stopped, other = await asyncio.wait_for(Crowd(script, server.connect).play(0), 5)
    assert stopped.cancelled_s is not None
    assert not stopped.completed
    assert not stopped.failed
    assert "a sent" not in server.log or "a left" in server.log
    assert other.completed
    assert server.running == 0


async def test_crowd_concurrency_is_never_exceeded():
    server = FakeServer()
    answers = await Crowd([Ask([3], 3, str(n)) for n in range(10)], server.connect).play(3)
    assert server.most == 3
    assert all(found.completed for found in answers)


async def test_crowd_protocol_error_is_told_and_ends_only_its_ask():
    async def connect(ask: Ask, stack: object):
        if ask.model == "bad":
            raise ValueError("503 no slot")
        return await FakeServer().connect(ask, stack)

    bad, good = await Crowd([Ask([1], 1, "bad"), Ask([1], 1, "good")], connect).play(0)
    assert "503 no slot" in bad.failed
    assert good.completed


async def test_crowd_connection_is_made_when_the_wait_is_over():
    """llama-server closes connections that are idle for five seconds: an ask that waited so long failed."""
    server = FakeServer()

    async def connect(ask: Ask, stack: object):
        server.log.append(f"{ask.model} connected")
        return await server.connect(ask, stack)

    await Crowd([Ask([2], 2, "a"), Ask([1], 1, "b", after=[0])], connect).play(0)
    assert server.log.index("b connected") > server.log.index("a left")


def test_rows_judge_against_the_peer_at_its_default_only():
    found = {"": Series([2.0]), sides.PEER: Series([4.0]), "llama-server --no-repack": Series([3.0])}
    judged, told = sides.rows("b", "w", "s", found, 0.4, "note")
    assert judged.peer_name == sides.PEER
    assert judged.limit is not None
    assert not judged.limit.holds
    assert judged.notes == "note"
    assert (told.peer_name, told.limit, told.notes) == ("llama-server --no-repack", None, "")


def test_at_once_measures_once_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait() -> None:
        raise AssertionError("it waited")

    monkeypatch.setattr("benchmarks.measure.wait_until_quiet", wait)
    monkeypatch.setattr("benchmarks.measure.Others.cores", lambda _: 2.0)
    plan, seen = Plan(at_once=True), []
    plan.undisturbed(lambda: seen.append(1))
    assert (len(seen), plan.others) == (1, 2.0)
