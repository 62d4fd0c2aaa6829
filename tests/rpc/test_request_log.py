"""The line that each call leaves in the log, and what never is in it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from bear_grpc.executor.spawner import Spawner
from bear_grpc.rpc.call import Call
from bear_grpc.telemetry.log_format import as_json, as_text
from bear_grpc.telemetry.request_log import MAX_NAME, MAX_TEXT, Kept, RequestLog
from bear_grpc.types import FinishReason
from tests.helpers.rpc import Api, Code, collect, eventually, fails, read_until, serving

SECRET = "my secret question"


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seen: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record)

    async def line(self, method: str, code: str) -> dict[str, Any]:
        """The fields of the last line of such a call; it may come after the client has its answer."""

        async def found() -> dict[str, Any] | None:
            for record in reversed(self.seen):
                fields: dict[str, Any] = getattr(record, "fields", {})
                if fields.get("method", "").endswith(f"/{method}") and fields["code"] == code:
                    return fields
            return None

        fields = await eventually(found)
        assert fields is not None
        return fields

    def of_worker(self, level: int) -> list[str]:
        said = [r for r in self.seen if r.name == "bear_grpc.executor.link" and r.levelno == level]
        return [record.getMessage() for record in said]


@pytest.fixture
def records() -> Iterator[Records]:
    handler, logger = Records(), logging.getLogger("bear_grpc")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.setLevel(before)
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
async def logged(
    tmp_path_factory: pytest.TempPathFactory, spawner: Spawner, tiny_file: Path
) -> AsyncIterator[Api]:
    folder = tmp_path_factory.mktemp("log")
    async with serving(folder, spawner, allow_path=[tiny_file.parent]) as (_, api):
        await api.register("tiny", tiny_file)
        await api.load("tiny")
        yield api


async def test_generation_leaves_one_line_with_all_that_it_was(logged: Api, records: Records) -> None:
    answer = await logged.once("tiny", max_tokens=5, ignore_eos=True, request_id="mine", n=2)
    fields = await records.line("GenerateOnce", "OK")
    assert (fields["id"], fields["model"], fields["tenant"]) == ("mine", "tiny", "unix")
    assert fields["peer"].startswith("unix:")
    assert fields["prompt_tokens"] == answer.usage.prompt_token_count
    assert (fields["cached_tokens"], fields["completion_tokens"]) == (0, 10)
    assert fields["finish"] == ["length", "length"]
    assert 0 <= fields["queue_s"] <= fields["total_s"]
    assert 0 < fields["ttft_s"] <= fields["total_s"]
    assert "reason" not in fields and "key" not in fields
    assert len([r for r in records.seen if getattr(r, "fields", {}).get("id") == "mine"]) == 1


async def test_error_is_told_by_code_and_reason(logged: Api, records: Records) -> None:
    await fails(logged.once("nobody" * 100), Code.NOT_FOUND, "MODEL_NOT_FOUND")
    fields = await records.line("GenerateOnce", "NOT_FOUND")
    assert fields["reason"] == "MODEL_NOT_FOUND"
    assert len(fields["model"]) == MAX_NAME


async def test_health_is_for_who_looks_closely(logged: Api, records: Records) -> None:
    await logged.health.Check(health_pb2.HealthCheckRequest())
    await records.line("Check", "OK")
    [record] = [r for r in records.seen if r.getMessage() == "Check OK"]
    assert record.levelno == logging.DEBUG


async def test_prompts_and_answers_are_in_no_line_however_a_call_ends(logged: Api, records: Records) -> None:
    answer = await logged.once("tiny", SECRET, max_tokens=20, ignore_eos=True)
    await logged.once("tiny", messages=[{"role": "user", "content": SECRET}], max_tokens=2)
    stream = logged.generate("tiny", SECRET, max_tokens=1900, ignore_eos=True)
    await read_until(stream, "delta")
    stream.cancel()
    cut = await records.line("Generate", "CANCELLED")
    assert cut["completion_tokens"] > 0  # what was drawn until then
    with pytest.raises(grpc.aio.AioRpcError):
        await logged.once("tiny", SECRET * 1000, max_tokens=2)
    with pytest.raises(grpc.aio.AioRpcError):
        await logged.once("tiny", SECRET, temperature=-1.0)
    await records.line("GenerateOnce", "INVALID_ARGUMENT")
    told = "\n".join(format(record) for record in records.seen for format in (as_json, as_text))
    assert "GenerateOnce" in told
    assert SECRET not in told and "secret" not in told
    assert answer.choices[0].text.strip() not in told


async def test_prompts_and_answers_are_told_if_a_setting_says_so(
    tmp_path: Path, spawner: Spawner, tiny_file: Path, records: Records
) -> None:
    settings = {"allow_path": [tiny_file.parent], "log_prompts": True}
    async with serving(tmp_path, spawner, **settings) as (_, api):
        await api.register("tiny", tiny_file)
        events = await collect(api.generate("tiny", SECRET, max_tokens=20, ignore_eos=True))
        fields = await records.line("Generate", "OK")
        assert fields["prompt"] == SECRET
        assert fields["answers"] == ["".join(event.delta.text for event in events)]
        await api.once("tiny", messages=[{"role": "user", "content": SECRET}], max_tokens=1)
        assert (await records.line("GenerateOnce", "OK"))["prompt"] == f"user: {SECRET}"


async def test_native_lines_have_their_levels_and_the_model(
    tmp_path: Path, spawner: Spawner, tiny_file: Path, records: Records
) -> None:
    async with serving(tmp_path, spawner, allow_path=[tiny_file.parent]) as (_, api):
        await api.register("tiny", tiny_file)
        await api.load("tiny")

        async def told() -> list[str]:
            return [line for line in records.of_worker(logging.DEBUG) if line.startswith("worker tiny: ")]

        lines = await eventually(told)
    assert any("llama_context" in line or "load_tensors" in line for line in lines)
    assert not any("<7>" in line or "<4>" in line for line in lines)
    told_models = {record.fields["model"] for record in records.seen if record.name.endswith("link")}  # type: ignore[attr-defined]
    assert told_models == {"probe", "tiny"}
    assert records.of_worker(logging.INFO) == []


def test_texts_are_cut() -> None:
    kept = Kept()
    for _ in range(10):
        kept.answer(7, "x" * 1000)
        kept.answer(3, "y")
    assert [len(answer) for answer in kept.answers] == [10, MAX_TEXT]


def test_fault_of_the_servers_is_a_warning(records: Records) -> None:
    for code, level in (("INTERNAL", logging.WARNING), ("NOT_FOUND", logging.INFO)):
        RequestLog().end(Call("/a.B/C", code=code, finish_reasons=[FinishReason.STOP]))
        assert records.seen[-1].levelno == level
