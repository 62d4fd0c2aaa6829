"""What answers tell besides text: log probabilities, the prompt itself, progress, what was cached or cut."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import types_pb2 as pb
from tests.helpers.rpc import Api, Code, collect, fails, kinds, text_of
from tests.rpc.conftest import NewModel

PROMPT = "hello the bear and one fish"
UNKNOWN, EOS = 0, 2


async def tokens_of(api: Api, model: str, text: str) -> inference_pb.TokenizeResponse:
    request = inference_pb.TokenizeRequest(model=model, text=text, include_pieces=True)
    return await api.inference.Tokenize(request)


# Log probabilities


@pytest.mark.parametrize("model", ["tiny", "bear-demo"])
async def test_greedy_takes_the_top_token_and_tells_its_logprob(
    api: Api, tiny: str, demo: str, model: str
) -> None:
    options: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1, "max_tokens": 12}
    answer = await api.once(model, PROMPT, top_logprobs=5, ignore_eos=True, **options)
    tokens = answer.choices[0].tokens
    assert len(tokens) == 12
    for token in tokens:
        assert token.HasField("logprob")
        assert -math.inf < token.logprob <= 0
        assert len(token.top) == 5
        found = [other.logprob for other in token.top]
        assert found == sorted(found, reverse=True)
        assert sum(map(math.exp, found)) <= 1 + 1e-4
        assert (token.top[0].id, token.top[0].piece) == (token.id, token.piece)
        assert token.top[0].logprob == pytest.approx(token.logprob, abs=1e-4)


async def test_logprobs_are_of_the_model_whatever_is_sampled(api: Api, tiny: str) -> None:
    """Temperature, penalties and biases change the draw, not what is told of it."""
    options: dict[str, Any] = {"max_tokens": 1, "top_logprobs": 1, "ignore_eos": True}
    greedy = (await api.once(tiny, PROMPT, temperature=0, **options)).choices[0].tokens[0]
    bent = await api.once(tiny, PROMPT, temperature=2, logit_bias={greedy.id: -1000.0}, **options)
    drawn = bent.choices[0].tokens[0]
    assert drawn.id != greedy.id
    assert drawn.top[0].id == greedy.top[0].id
    assert drawn.top[0].logprob == pytest.approx(greedy.top[0].logprob, abs=1e-4)
    assert drawn.logprob <= drawn.top[0].logprob


async def test_logprobs_alone_have_no_top(api: Api, tiny: str) -> None:
    tokens = (await api.once(tiny, logprobs=True, max_tokens=3, ignore_eos=True)).choices[0].tokens
    assert [(token.HasField("logprob"), len(token.top)) for token in tokens] == [(True, 0)] * 3


async def test_tokens_without_logprobs_have_their_bytes_only(api: Api, tiny: str) -> None:
    options: dict[str, Any] = {"max_tokens": 16, "return_token_ids": True, "ignore_eos": True, "seed": 1}
    # The token of unknown text is a control token: it has bytes but no text.
    events = await collect(api.generate(tiny, logit_bias={UNKNOWN: -1000.0}, **options))
    tokens = [token for event in events for token in event.delta.tokens]
    assert len(tokens) == 16
    assert not any(token.HasField("logprob") or token.top for token in tokens)
    assert b"".join(token.piece for token in tokens).decode(errors="replace") == text_of(events)


async def test_nothing_asked_for_tells_no_tokens(api: Api, tiny: str) -> None:
    assert not (await api.once(tiny, max_tokens=3, ignore_eos=True)).choices[0].tokens


# Echo


async def test_echo_gives_the_prompt_before_the_text(api: Api, tiny: str) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    plain = await api.once(tiny, PROMPT, **options)
    echoed = await api.once(tiny, PROMPT, echo=True, **options)
    text = echoed.choices[0].text
    assert text.lstrip().startswith(PROMPT)
    assert text.endswith(plain.choices[0].text)
    assert len(text.lstrip()) == len(PROMPT) + len(plain.choices[0].text)
    assert echoed.usage.completion_token_count == 8


async def test_echo_with_logprobs_tells_them_of_all_prompt_tokens_but_the_first(api: Api, tiny: str) -> None:
    prompt = (await tokens_of(api, tiny, PROMPT)).token_ids
    answer = await api.once(tiny, PROMPT, echo=True, top_logprobs=2, max_tokens=4, ignore_eos=True)
    tokens = answer.choices[0].tokens
    assert [token.id for token in tokens[: len(prompt)]] == list(prompt)
    assert len(tokens) == len(prompt) + 4
    assert [token.HasField("logprob") for token in tokens] == [False] + [True] * (len(tokens) - 1)
    assert [len(token.top) for token in tokens] == [0] + [2] * (len(tokens) - 1)
    assert all(token.logprob <= 0 for token in tokens)
    assert answer.usage.cached_token_count == 0


async def test_echo_of_a_prompt_logprob_is_what_drawing_it_would_tell(api: Api, tiny: str) -> None:
    drawn = await api.once(
        tiny, PROMPT, temperature=0, max_tokens=1, logprobs=True, ignore_eos=True, repetition_penalty=1
    )
    token = drawn.choices[0].tokens[0]
    ids = [*(await tokens_of(api, tiny, PROMPT)).token_ids, token.id]
    echoed = await api.once(tiny, token_ids=ids, echo=True, logprobs=True, max_tokens=0)
    assert echoed.choices[0].tokens[-1].id == token.id
    assert echoed.choices[0].tokens[-1].logprob == pytest.approx(token.logprob, abs=1e-3)


# Progress


async def test_prefill_progress_rises_to_the_whole_prompt(api: Api, new_model: NewModel) -> None:
    options = pb.LoadOptions(threads=1, max_sequences=1, batch_tokens=32, micro_batch_tokens=32)
    name = await new_model(load_options=options)
    events = await collect(api.generate(name, "bear " * 40, max_tokens=1, prefill_progress=True))
    told = [event.prefill_progress for event in events if event.HasField("prefill_progress")]
    assert kinds(events)[:2] == ["started", "prefill_progress"]
    total = events[0].started.prompt_token_count
    assert {each.total_token_count for each in told} == {total}
    done = [each.completed_token_count for each in told]
    assert done == sorted(set(done))
    assert done[-1] == total


async def test_prefill_progress_is_told_only_if_asked_for(api: Api, tiny: str) -> None:
    events = await collect(api.generate(tiny, "bear " * 40, max_tokens=1))
    assert "prefill_progress" not in kinds(events)


# Cached and cut prompts


async def test_a_repeated_prompt_is_taken_from_the_cache(api: Api, new_model: NewModel) -> None:
    name = await new_model()
    prompt = "the bear and one fish " * 10
    first, second = [await api.once(name, prompt, temperature=0, max_tokens=8) for _ in range(2)]
    assert first.usage.cached_token_count == first.started.cached_token_count == 0
    assert 0 < second.usage.cached_token_count < second.usage.prompt_token_count
    assert second.started.cached_token_count == second.usage.cached_token_count
    assert second.choices[0].text == first.choices[0].text
    status = await api.idle(name)
    assert status.counters.cached_token_count == second.usage.cached_token_count
    assert 0 < status.kv_cache_idle_token_count <= status.kv_cache_used_token_count


@pytest.mark.parametrize("policy", ["truncate_left", "truncate_middle"])
async def test_a_prompt_that_is_too_long_is_cut_if_asked_for(
    api: Api, new_model: NewModel, policy: Any
) -> None:
    name = await new_model(load_options=pb.LoadOptions(threads=1, max_sequences=1, context_length=64))
    prompt = "the bear and one fish " * 20
    whole = len((await tokens_of(api, name, prompt)).token_ids)
    options: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
    await fails(api.once(name, prompt, **options), Code.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED")
    answer = await api.once(name, prompt, overflow_policy=policy, **options)
    assert answer.started.truncated_token_count > 0
    assert answer.started.prompt_token_count + answer.started.truncated_token_count == whole
    assert answer.usage.prompt_token_count + 8 <= 64
    assert answer.usage.completion_token_count == 8


async def test_a_prompt_that_fits_is_not_cut(api: Api, tiny: str) -> None:
    answer = await api.once(tiny, PROMPT, overflow_policy="truncate_left", max_tokens=1)
    assert answer.started.truncated_token_count == 0


# Least tokens


async def test_min_tokens_come_before_the_models_end(api: Api, tiny: str) -> None:
    answer = await api.once(tiny, PROMPT, max_tokens=20, min_tokens=5, logit_bias={EOS: 1000.0})
    assert answer.choices[0].stop_cause.eog_token == EOS
    assert answer.usage.completion_token_count == 6


async def test_min_tokens_do_not_hold_up_a_stop_sequence(api: Api, tiny: str) -> None:
    (bear,) = (
        await api.inference.Tokenize(inference_pb.TokenizeRequest(model=tiny, text="bear", add_special=False))
    ).token_ids
    answer = await api.once(
        tiny, PROMPT, max_tokens=20, min_tokens=9, stop=["bear"], logit_bias={bear: 1000.0}
    )
    assert answer.choices[0].stop_cause.sequence == "bear"
    assert answer.usage.completion_token_count == 1


# Samplers


@pytest.mark.parametrize(
    "options",
    [
        {"top_n_sigma": 1.0},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"dry_multiplier": 0.8, "dry_allowed_length": 1, "dry_sequence_breakers": ["\n"]},
        {"dynamic_temperature_range": 0.5, "dynamic_temperature_exponent": 2.0},
        {"mirostat": 1},
        {"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.2},
        {"adaptive_p_target": 0.5},
        {"sampler_order": ["temperature", "top_k"]},
        {"typical_p": 0.5, "min_keep": 3},
    ],
    ids=str,
)
async def test_every_sampler_gives_a_text_that_its_seed_repeats(
    api: Api, tiny: str, options: dict[str, Any]
) -> None:
    answers = [
        await api.once(tiny, PROMPT, temperature=1, seed=3, max_tokens=12, ignore_eos=True, **options)
        for _ in range(2)
    ]
    assert answers[0].choices[0].text == answers[1].choices[0].text
    assert answers[0].usage.completion_token_count == 12
    told = answers[0].started.sampling
    for name, value in options.items():
        if not isinstance(value, list):
            assert getattr(told, name) == value
    assert len(told.sampler_order) == len(options.get("sampler_order", range(9)))
