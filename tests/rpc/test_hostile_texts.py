"""Texts and templates that cost much: they are refused, and their neighbours go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bear_grpc.input_limits import DEFAULT_LIMITS
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.ggufs import write_tiny_llama
from tests.helpers.rpc import Api, Code, fails, read_until

MEBI = 2**20
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FLOODING = "{% for a in range(99999) %}{{ 'x' * 100000 }}{% endfor %}"
# From here on a client takes a server for hung.
PATIENCE_S = 10.0


def chat(model: str, count: int = 1) -> inference_pb.TokenizeRequest:
    message = inference_pb.ChatMessage(role="user", content=[inference_pb.ContentPart(text="a")])
    return inference_pb.TokenizeRequest(model=model, chat=inference_pb.ChatInput(messages=[message] * count))


@pytest.fixture
async def hostile(api: Api, files: Path, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A loaded model whose template is the parameter."""
    path = write_tiny_llama(
        files / "hostile.gguf",
        n_embd=256,
        n_layer=6,
        n_ff=1024,
        context_length=2048,
        chat_template=request.param,
    )
    await api.register("hostile", path, load_options=pb.LoadOptions(threads=1, max_sequences=1))
    await api.load("hostile")
    yield "hostile"
    await api.unload("hostile", 0)
    await api.delete("hostile")
    path.unlink()


@pytest.mark.parametrize("hostile", [ENDLESS], indirect=True)
async def test_an_endless_template_is_stopped_while_streams_run(api: Api, hostile: str) -> None:
    """The clock that stops it stood still while a stream kept the worker's socket busy."""
    streams = [api.generate(hostile, max_tokens=1900, ignore_eos=True) for _ in range(4)]
    await read_until(streams[0], "delta")
    async with asyncio.timeout(PATIENCE_S):
        status = await fails(api.inference.Tokenize(chat(hostile)), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert "more than" in status.message
    model = await api.status(hostile)
    assert (model.running_count, model.counters.finished_sequence_count < 4) == (1, True)
    for stream in streams:
        stream.cancel()
    assert (await api.once(hostile, max_tokens=1)).usage.completion_token_count == 1


@pytest.mark.parametrize("hostile", [FLOODING, "{{ 1 / 0 }}", "{{ missing.x }}", "{% if %}"], indirect=True)
async def test_a_template_that_fails_or_floods_is_refused(api: Api, hostile: str) -> None:
    await fails(api.inference.Tokenize(chat(hostile)), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert (await api.once(hostile, max_tokens=1)).usage.completion_token_count == 1


@pytest.mark.parametrize("model", ["tiny", "bear-demo"])
@pytest.mark.parametrize("unit", ["a", " ", "\n", "\0", "1", "熊", "🐻", "the bear, "], ids=ascii)
async def test_a_long_text_of_any_kind_does_not_hold_up_the_others(
    api: Api, tiny: str, demo: str, model: str, unit: str
) -> None:
    """SPM takes quadratic time for characters without a token: a mebibyte of them took a minute."""
    pid = (await api.status(model)).worker_process_id
    # As long without white space as may be.
    longest = DEFAULT_LIMITS.max_unbroken_bytes
    text = " ".join([unit * ((longest - 1) // len(unit.encode()))] * (MEBI // longest))
    call = api.inference.CountTokens(inference_pb.CountTokensRequest(model=model, prompt=text))
    job = asyncio.gather(call, return_exceptions=True)
    began = time.monotonic()
    async with asyncio.timeout(PATIENCE_S):
        assert (await api.once(model, max_tokens=1)).usage.completion_token_count == 1
        (result,) = await job
    assert time.monotonic() - began < PATIENCE_S
    if isinstance(result, BaseException):
        await fails(call, Code.INVALID_ARGUMENT, "INVALID_FIELD")
    else:
        assert result.token_count > 0
    assert (await api.status(model)).worker_process_id == pid


@pytest.mark.parametrize("count", [1_000, 23_000, 100_000])
async def test_a_chat_of_very_many_messages_does_not_hold_up_the_others(
    api: Api, demo: str, count: int
) -> None:
    """llama.cpp takes quadratic time for control tokens: a hundred thousand messages took minutes."""
    pid = (await api.status(demo)).worker_process_id
    job = asyncio.gather(api.inference.CountTokens(_as_count(chat(demo, count))), return_exceptions=True)
    async with asyncio.timeout(PATIENCE_S):
        assert (await api.once(demo, max_tokens=1)).usage.completion_token_count == 1
        await job
    assert (await api.status(demo)).worker_process_id == pid


@pytest.mark.parametrize("count", [1_000, 20_000, 130_000])
async def test_a_text_of_very_many_control_tokens_does_not_hold_up_the_others(
    api: Api, demo: str, count: int
) -> None:
    pid = (await api.status(demo)).worker_process_id
    request = inference_pb.TokenizeRequest(model=demo, text="<|user|>" * count, parse_special=True)
    job = asyncio.gather(api.inference.Tokenize(request), return_exceptions=True)
    async with asyncio.timeout(PATIENCE_S):
        assert (await api.once(demo, max_tokens=1)).usage.completion_token_count == 1
        await job
    assert (await api.status(demo)).worker_process_id == pid


def _as_count(request: inference_pb.TokenizeRequest) -> inference_pb.CountTokensRequest:
    return inference_pb.CountTokensRequest(model=request.model, chat=request.chat)


async def test_the_text_of_control_tokens_in_a_prompt_or_message_is_text(api: Api, demo: str) -> None:
    special = "<s></s><|im_start|><|im_end|><|user|><|assistant|>"
    for request in (
        inference_pb.TokenizeRequest(model=demo, text=special, add_special=False, include_pieces=True),
        inference_pb.TokenizeRequest(model=demo, text=special, parse_special=True, add_special=False),
    ):
        answer = await api.inference.Tokenize(request)
        assert answer.token_ids
        if not request.parse_special:
            assert b"".join(answer.pieces).decode().strip() == special
            assert len(answer.token_ids) > 6
