"""Generate and GenerateOnce: what requests ask for, and what comes of it."""

from __future__ import annotations

import asyncio
import time

import pytest

from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.rpc import Api, Code, collect, eventually, fails, kinds, read_until, stream_fails, text_of
from tests.rpc.conftest import NewModel

LENGTH, STOP = inference_pb.FINISH_REASON_LENGTH, inference_pb.FINISH_REASON_STOP


@pytest.fixture(scope="module")
async def bear_token(api: Api, tiny: str) -> int:
    """The token of the word ` bear`."""
    request = inference_pb.TokenizeRequest(model=tiny, text="bear", add_special=False)
    (token,) = (await api.inference.Tokenize(request)).token_ids
    return token


async def count(api: Api, model: str, prompt: str) -> inference_pb.CountTokensResponse:
    return await api.inference.CountTokens(inference_pb.CountTokensRequest(model=model, prompt=prompt))


# Sampling


async def test_a_seed_repeats_its_text_and_another_gives_another(api: Api, tiny: str) -> None:
    texts = [
        (await api.once(tiny, "hello", temperature=1, max_tokens=32, seed=seed, ignore_eos=True))
        .choices[0]
        .text
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]


async def test_an_unset_seed_is_told_and_repeats_the_run(api: Api, tiny: str) -> None:
    first = await api.once(tiny, "hello", temperature=1, max_tokens=32, ignore_eos=True)
    assert first.started.sampling.HasField("seed")
    seed = first.started.sampling.seed
    second = await api.once(tiny, "hello", temperature=1, max_tokens=32, seed=seed, ignore_eos=True)
    assert second.choices[0].text == first.choices[0].text


async def test_unset_sampling_takes_the_servers_values(api: Api, tiny: str) -> None:
    sampling = (await api.once(tiny, max_tokens=1)).started.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.8, 40, 0.95, 0.0)
    assert (sampling.repetition_penalty, sampling.repetition_window) == (1.1, 64)


async def test_unset_sampling_takes_the_models_own_values_first(api: Api, demo: str) -> None:
    unset = (await api.once(demo, max_tokens=1)).started.sampling
    assert (unset.temperature, unset.repetition_penalty, unset.top_k) == (0.0, 1.0, 40)
    asked = (await api.once(demo, max_tokens=1, temperature=0.5)).started.sampling
    assert (asked.temperature, asked.repetition_penalty) == (0.5, 1.0)


async def test_a_temperature_of_zero_is_greedy_whatever_the_seed(api: Api, tiny: str) -> None:
    texts = {
        (await api.once(tiny, temperature=0, max_tokens=32, seed=seed, ignore_eos=True)).choices[0].text
        for seed in range(3)
    }
    assert len(texts) == 1


async def test_a_logit_bias_decides(api: Api, tiny: str, bear_token: int) -> None:
    answer = await api.once(tiny, max_tokens=3, logit_bias={bear_token: 1000}, repetition_penalty=1)
    assert answer.choices[0].text == " bear bear bear"


# Length


async def test_max_tokens_zero_reads_the_prompt_only(api: Api, tiny: str) -> None:
    events = await collect(api.generate(tiny, "hello", max_tokens=0))
    assert kinds(events) == ["started", "completed"]
    completed = events[-1].completed
    assert completed.finish_reason == LENGTH
    assert completed.usage.completion_token_count == 0
    assert completed.usage.prompt_token_count == (await count(api, tiny, "hello")).token_count
    assert completed.timings.prefill_seconds > 0
    assert (completed.timings.ttft_seconds, completed.timings.decode_seconds) == (0, 0)


async def test_max_tokens_one_gives_one_token(api: Api, tiny: str, bear_token: int) -> None:
    answer = await api.once(tiny, max_tokens=1, logit_bias={bear_token: 1000}, return_token_ids=True)
    choice = answer.choices[0]
    assert [token.id for token in choice.tokens] == [bear_token]
    assert (choice.text, choice.finish_reason) == (" bear", LENGTH)
    assert answer.usage.completion_token_count == 1


async def test_max_tokens_that_just_fit_are_all_given(api: Api, tiny: str) -> None:
    counted = await count(api, tiny, "hello")
    room = counted.context_length - counted.token_count
    answer = await api.once(tiny, "hello", max_tokens=room, ignore_eos=True)
    assert answer.usage.completion_token_count == room
    assert answer.choices[0].finish_reason == LENGTH


async def test_explicit_max_tokens_beyond_the_context_are_refused_with_the_numbers(
    api: Api, tiny: str
) -> None:
    counted = await count(api, tiny, "hello")
    room = counted.context_length - counted.token_count
    status = await fails(
        api.once(tiny, "hello", max_tokens=room + 1), Code.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED"
    )
    assert status.metadata == {
        "prompt_token_count": str(counted.token_count),
        "max_tokens": str(room + 1),
        "context_length": str(counted.context_length),
    }


async def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(api: Api, tiny: str) -> None:
    prompt = "x" * 3000
    seen, status = await stream_fails(
        api.generate(tiny, prompt), Code.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED"
    )
    assert seen == []
    assert status.metadata == {
        "prompt_token_count": str((await count(api, tiny, prompt)).token_count),
        "context_length": "2048",
    }


async def test_unset_max_tokens_are_the_default_or_what_is_left(api: Api, tiny: str, demo: str) -> None:
    for model, prompt, expected in ((tiny, "hello", 512), (demo, "hello", 256)):
        async with asyncio.timeout(10):
            call = api.generate(model, prompt)
            assert (await call.read()).started.max_tokens == expected
            call.cancel()
    prompt = "x" * 2000
    left = 2048 - (await count(api, tiny, prompt)).token_count
    answer = await api.once(tiny, prompt, ignore_eos=True)
    assert answer.started.max_tokens == answer.usage.completion_token_count == left


# Stops


async def test_a_stop_sequence_over_a_token_border_cuts_inside_the_tokens(
    api: Api, tiny: str, bear_token: int
) -> None:
    events = await collect(
        api.generate(
            tiny, max_tokens=8, stop=["xx", "r b"], logit_bias={bear_token: 1000}, repetition_penalty=1
        )
    )
    completed = events[-1].completed
    assert text_of(events) == " bea"
    assert completed.finish_reason == STOP
    assert completed.stop_cause.sequence == "r b"
    assert completed.usage.completion_token_count == 2


async def test_the_beginning_of_a_stop_sequence_is_given_when_it_does_not_go_on(
    api: Api, tiny: str, bear_token: int
) -> None:
    answer = await api.once(
        tiny,
        max_tokens=2,
        stop=["r bx", "bear bear bear"],
        logit_bias={bear_token: 1000},
        repetition_penalty=1,
    )
    assert answer.choices[0].text == " bear bear"
    assert answer.choices[0].finish_reason == LENGTH
    assert not answer.choices[0].HasField("stop_cause")


async def test_a_stop_token_ends_and_is_not_part_of_the_text(api: Api, tiny: str, bear_token: int) -> None:
    answer = await api.once(tiny, stop_token_ids=[bear_token], logit_bias={bear_token: 1000})
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("", STOP)
    assert choice.stop_cause.token_id == bear_token
    assert answer.usage.completion_token_count == 1


async def test_the_models_end_is_told_and_ignore_eos_never_draws_it(api: Api, tiny: str) -> None:
    eos = {2: 1000.0}
    ended = (await api.once(tiny, max_tokens=4, logit_bias=eos)).choices[0]
    assert (ended.text, ended.finish_reason, ended.stop_cause.eog_token) == ("", STOP, 2)
    ignored = await api.once(tiny, max_tokens=4, logit_bias=eos, ignore_eos=True)
    assert ignored.choices[0].finish_reason == LENGTH
    assert ignored.usage.completion_token_count == 4


# Input


async def test_token_ids_give_what_their_prompt_gives(api: Api, tiny: str) -> None:
    prompt = "hello the bear and one fish"
    tokenized = await api.inference.Tokenize(inference_pb.TokenizeRequest(model=tiny, text=prompt))
    by_text = await api.once(tiny, prompt, temperature=0, max_tokens=16)
    by_ids = await api.once(tiny, token_ids=tokenized.token_ids, temperature=0, max_tokens=16)
    assert by_ids.choices[0].text == by_text.choices[0].text
    assert by_ids.usage.prompt_token_count == by_text.usage.prompt_token_count
    assert by_ids.usage.completion_token_count == by_text.usage.completion_token_count


async def test_token_ids_outside_the_vocabulary_are_named(api: Api, tiny: str) -> None:
    status = await fails(api.once(tiny, token_ids=[1, 2**31 - 1]), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == ["request.token_ids.ids[1]"]


async def test_a_chat_is_rendered_with_the_models_template(api: Api, tiny: str) -> None:
    chat = inference_pb.ChatInput(
        messages=[
            inference_pb.ChatMessage(
                role="user", content=[inference_pb.ContentPart(text=t) for t in ("the ", "bear")]
            )
        ]
    )
    rendered = await api.inference.Tokenize(inference_pb.TokenizeRequest(model=tiny, chat=chat))
    assert rendered.rendered_text == "user: the bear\nassistant: "
    counted = await api.inference.CountTokens(inference_pb.CountTokensRequest(model=tiny, chat=chat))
    answer = await api.once(tiny, messages=[{"role": "user", "content": "the bear"}], max_tokens=1)
    assert answer.started.prompt_token_count == counted.token_count == len(rendered.token_ids)


async def test_a_chat_with_a_model_without_template_is_refused(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    model = await api.once(name, max_tokens=0)  # loads it
    assert model.started.model == name
    status = await fails(
        api.once(name, messages=[{"role": "user", "content": "hi"}]), Code.INVALID_ARGUMENT, "INVALID_FIELD"
    )
    assert [field.removeprefix("request.") for field in status.fields] == ["chat"]


async def test_detokenize_undoes_tokenize(api: Api, tiny: str) -> None:
    text = "the bear ät the river 熊"
    request = inference_pb.TokenizeRequest(model=tiny, text=text, include_pieces=True)
    tokenized = await api.inference.Tokenize(request)
    assert b"".join(tokenized.pieces).decode().removeprefix("<s>") == f" {text}"
    back = await api.inference.Detokenize(
        inference_pb.DetokenizeRequest(model=tiny, token_ids=tokenized.token_ids)
    )
    assert back.text == f" {text}"
    assert back.raw == back.text.encode()


async def test_a_huge_detokenize_does_not_end_the_worker(api: Api, tiny: str) -> None:
    """The answer was larger than a frame may be, and its sender died of it."""
    before = await api.status(tiny)
    honey = inference_pb.TokenizeRequest(model=tiny, text="honey", add_special=False)
    (token,) = (await api.inference.Tokenize(honey)).token_ids
    request = inference_pb.DetokenizeRequest(model=tiny, token_ids=[token] * 1_500_000)
    status = await fails(api.inference.Detokenize(request), Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert status.fields == ["token_ids"]
    assert (await api.status(tiny)).worker_process_id == before.worker_process_id


# Request ids


async def test_a_chosen_request_id_is_in_every_event_and_free_again_afterwards(api: Api, tiny: str) -> None:
    for _ in range(2):
        events = await collect(api.generate(tiny, max_tokens=4, request_id="mine"))
        assert {event.request_id for event in events} == {"mine"}
    assert (await api.once(tiny, max_tokens=1, request_id="mine")).request_id == "mine"


async def test_request_ids_chosen_by_the_server_differ(api: Api, tiny: str) -> None:
    ids = {(await api.once(tiny, max_tokens=0)).request_id for _ in range(3)}
    assert len(ids - {""}) == 3


async def test_a_request_id_of_a_running_request_is_refused(api: Api, steady: str) -> None:
    running = api.generate(steady, max_tokens=1900, ignore_eos=True, request_id="taken")
    await read_until(running, "started")
    status = await fails(api.once(steady, request_id="taken"), Code.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
    assert status.metadata == {"request_id": "taken"}
    running.cancel()


# Times


async def test_timings_are_positive_and_add_up(api: Api, steady: str) -> None:
    began = time.monotonic()
    answer = await api.once(steady, "the bear " * 20, max_tokens=30, ignore_eos=True)
    elapsed = time.monotonic() - began
    timings, usage = answer.choices[0].timings, answer.usage
    assert min(timings.queue_seconds, timings.prefill_seconds, timings.decode_seconds) > 0
    parts = timings.queue_seconds + timings.prefill_seconds + timings.decode_seconds
    assert parts <= timings.total_seconds <= elapsed
    assert timings.queue_seconds + timings.prefill_seconds <= timings.ttft_seconds <= elapsed
    assert timings.prefill_tokens_per_second == pytest.approx(
        (usage.prompt_token_count - usage.cached_token_count) / timings.prefill_seconds
    )
    assert timings.decode_tokens_per_second == pytest.approx(29 / timings.decode_seconds)


# Queue


async def test_a_second_request_waits_its_turn_and_is_served(api: Api, steady: str) -> None:
    first = api.generate(steady, max_tokens=1900, ignore_eos=True)
    await read_until(first, "delta")
    second = api.generate(steady, max_tokens=3, ignore_eos=True, queue_progress=True)
    queued = await second.read()
    assert (queued.HasField("queued"), queued.queued.position) == (True, 0)

    async def waits() -> bool:
        status = await api.status(steady)
        return (status.running_count, status.waiting_count) == (1, 1)

    await eventually(waits)
    first.cancel()
    events = await collect(second)
    assert kinds(events) == ["started", "delta", "completed"]
    assert events[-1].completed.timings.queue_seconds > 0


async def test_more_requests_than_may_wait_are_refused(api: Api, steady: str) -> None:
    options = {"max_tokens": 1900, "ignore_eos": True, "queue_progress": True}
    calls = [api.generate(steady, **options)]
    await read_until(calls[0], "delta")
    calls += [api.generate(steady, **options) for _ in range(512)]
    await asyncio.gather(*(call.read() for call in calls[1:]))
    status = await fails(api.once(steady), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert status.metadata["limit"] == "512"
    assert status.retry is not None
    for call in calls:
        call.cancel()
    await api.idle(steady)
    assert (await api.once(steady, max_tokens=1)).usage.completion_token_count == 1


QUESTIONS = [f"What is {what} {number}?" for number in range(10) for what in ("a bear", "GGUF", "n", "é", "")]


async def test_fifty_clients_at_once_get_what_each_gets_alone(api: Api, demo: str) -> None:
    assert len(set(QUESTIONS)) == 50
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    alone = [await api.once(demo, messages=messages, max_tokens=24) for messages in asked]
    clients = [Api(api.target) for _ in asked]
    try:
        streams = [
            client.generate(demo, messages=messages, max_tokens=24)
            for client, messages in zip(clients, asked, strict=True)
        ]
        together = await asyncio.gather(*map(collect, streams))
    finally:
        await asyncio.gather(*(client.channel.close() for client in clients))
    for single, events in zip(alone, together, strict=True):
        assert text_of(events) == single.choices[0].text
        usage = events[-1].completed.usage
        assert usage.prompt_token_count == single.usage.prompt_token_count
        assert usage.completion_token_count == single.usage.completion_token_count
        assert events[-1].completed.finish_reason == single.choices[0].finish_reason
        assert sum(event.HasField("completed") for event in events) == 1


async def test_batched_sequences_get_what_each_gets_alone(api: Api, new_model: NewModel) -> None:
    name = await new_model(load_options=pb.LoadOptions(threads=1, max_sequences=8, context_length=512))
    prompts = [f"the bear and {number} fish" for number in range(16)]
    options = {"temperature": 0, "max_tokens": 64, "ignore_eos": True}
    alone = [(await api.once(name, prompt, **options)).choices[0].text for prompt in prompts]
    together = await asyncio.gather(*(api.once(name, prompt, **options) for prompt in prompts))
    assert [answer.choices[0].text for answer in together] == alone
