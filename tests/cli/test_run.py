"""`bear run`: the answer on stdout, the numbers on stderr, a conversation that remembers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from bear_grpc.cli import talk
from bear_grpc.cli.progress import ModelBar
from bear_grpc.client import Client
from bear_grpc.v1 import inference_service_pb2 as inference
from bear_grpc.v1 import types_pb2 as types
from tests.cli.conftest import Bear
from tests.client import samples
from tests.client.fake_server import FakeServer, Refusal


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target) as made:
        yield made


def said(request: inference.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content[0].text) for message in request.chat.messages]


def test_answer_on_stdout_and_numbers_on_stderr(bear: Bear) -> None:
    result = bear("run", "bear-demo", "Hi")
    assert result.exit_code == 0
    assert result.stdout == "Hello\n"
    assert result.stderr == "7 prompt tokens, 3 completion tokens, 92.1 tokens/s, TTFT 52 ms, STOP\n"


def test_quiet_leaves_stderr_empty(bear: Bear) -> None:
    assert bear("run", "bear-demo", "Hi", "--quiet").stderr == ""


def test_a_model_with_a_template_gets_a_chat(bear: Bear, server: FakeServer) -> None:
    bear("run", "bear-demo", "Hi", "--system", "Be brief.")
    assert said(server.last(inference.GenerateRequest)) == [("system", "Be brief."), ("user", "Hi")]


def test_raw_sends_a_prompt(bear: Bear, server: FakeServer) -> None:
    bear("run", "bear-demo", "Hi", "--raw")
    assert server.last(inference.GenerateRequest).prompt == "Hi"


def test_a_model_without_a_template_gets_a_prompt(bear: Bear, server: FakeServer) -> None:
    bear("run", "plain", "Hi")
    assert server.last(inference.GenerateRequest).prompt == "Hi"


def test_the_prompt_may_be_piped_in(bear: Bear, server: FakeServer) -> None:
    bear("run", "plain", stdin="two\nlines\n")
    assert server.last(inference.GenerateRequest).prompt == "two\nlines"


@pytest.mark.parametrize("stdin", [b"", b"\xff\xfe"])
def test_no_text_on_stdin_is_bad_usage(bear: Bear, stdin: bytes) -> None:
    result = bear("run", "plain", stdin=stdin)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_raw_and_system_are_bad_usage(bear: Bear) -> None:
    assert bear("run", "plain", "Hi", "--raw", "--system", "x").exit_code == 2


def test_options_not_given_are_unset_and_0_is_set(bear: Bear, server: FakeServer) -> None:
    bear("run", "plain", "Hi", "--temperature", "0", "--seed", "0", "--stop", "a", "--stop", "b")
    request = server.last(inference.GenerateRequest)
    assert {field.name for field, _ in request.sampling.ListFields()} == {"temperature", "seed"}
    assert list(request.stop.sequences) == ["a", "b"]
    assert not request.stop.HasField("max_tokens")
    assert not request.output.queue_progress


def test_options_of_the_answer_land_in_their_fields(bear: Bear, server: FakeServer) -> None:
    bear(
        *("run", "plain", "Hi", "--n", "2", "--choice", "yes", "--choice", "no", "--logprobs", "3", "--echo"),
        *("--min-tokens", "4", "--overflow", "truncate_left", "--mirostat", "2", "--xtc-probability", "0.5"),
    )
    request = server.last(inference.GenerateRequest)
    assert request.n == 2
    assert list(request.constraint.choices.values) == ["yes", "no"]
    assert request.output == inference.OutputOptions(logprobs=True, top_logprobs=3, echo=True)
    assert request.stop.min_tokens == 4
    assert request.overflow_policy == inference.OVERFLOW_POLICY_TRUNCATE_LEFT
    assert (request.sampling.mirostat, request.sampling.xtc_probability) == (2, 0.5)


def test_logprobs_0_asks_for_the_chosen_tokens_only(bear: Bear, server: FakeServer) -> None:
    bear("run", "plain", "Hi", "--logprobs", "0")
    assert server.last(inference.GenerateRequest).output == inference.OutputOptions(logprobs=True)


@pytest.mark.parametrize(
    ("option", "field"), [("--lark", "lark"), ("--gbnf", "gbnf"), ("--json-schema", "json_schema_json")]
)
def test_a_grammar_is_read_from_its_file(
    bear: Bear, server: FakeServer, tmp_path: Path, option: str, field: str
) -> None:
    file = tmp_path / "grammar"
    file.write_text("root ::= x", encoding="utf-8")
    bear("run", "plain", "Hi", option, str(file))
    assert getattr(server.last(inference.GenerateRequest).constraint, field) == "root ::= x"


def test_a_json_schema_may_be_given_as_it_is(bear: Bear, server: FakeServer) -> None:
    bear("run", "plain", "Hi", "--json-schema", '{"type": "object"}')
    constraint = server.last(inference.GenerateRequest).constraint
    assert constraint.json_schema_json == '{"type": "object"}'


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_grammar_that_cannot_be_read_is_bad_usage(
    bear: Bear, tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "grammar"
    if content is not None:
        file.write_bytes(content)
    assert bear("run", "plain", "Hi", "--gbnf", str(file)).exit_code == 2


def test_two_constraints_are_an_error(bear: Bear) -> None:
    result = bear("run", "plain", "Hi", "--regex", "a", "--choice", "b")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "regex and choices" in result.stderr


def test_every_sampling_field_may_be_given_by_name(bear: Bear, server: FakeServer) -> None:
    given = {
        "dry_base": ("1.5", 1.5),
        "min-keep": ("3", 3),
        "logit_bias": ("5:-1.5,6:2", [(5, -1.5), (6, 2)]),
        "dry_sequence_breakers": ('["\\n", ","]', ["\n", ","]),
        "sampler_order": ("top_k,temperature", [4, 9]),
    }
    bear("run", "plain", "Hi", *(arg for n, (v, _) in given.items() for arg in ("--sampling", f"{n}={v}")))
    sampling = server.last(inference.GenerateRequest).sampling
    assert (sampling.dry_base, sampling.min_keep) == (1.5, 3)
    assert [(bias.token_id, bias.bias) for bias in sampling.logit_bias] == given["logit_bias"][1]
    assert list(sampling.dry_sequence_breakers) == given["dry_sequence_breakers"][1]
    assert list(sampling.sampler_order) == given["sampler_order"][1]


@pytest.mark.parametrize("pair", ["heat=1", "top_k", "top_k=many", "logit_bias=5", "sampler_order=[", "=1"])
def test_a_sampling_value_that_is_none_is_bad_usage(bear: Bear, pair: str) -> None:
    assert bear("run", "plain", "Hi", "--sampling", pair).exit_code == 2


def test_several_answers_come_one_after_the_other(bear: Bear, server: FakeServer) -> None:
    server.texts = ["Hel", "lo"]
    result = bear("run", "plain", "Hi", "--n", "3")
    assert result.stdout == "Hello 0\nHello 1\nHello 2\n"
    headings = [line for line in result.stderr.splitlines() if line.startswith("---")]
    assert headings == [f"--- answer {place} of 3" for place in (1, 2, 3)]
    assert result.stderr.count("completion tokens") == 3
    assert bear("run", "plain", "Hi", "--n", "2", "--quiet").stderr == ""


def test_an_answer_that_ends_in_a_newline_gets_no_second(bear: Bear, server: FakeServer) -> None:
    server.texts = ["line\n"]
    assert bear("run", "plain", "Hi").stdout == "line\n"


def test_a_pipe_gets_the_text_as_it_is(bear: Bear, server: FakeServer) -> None:
    server.texts = ["\x1b[31mred"]
    assert bear("run", "plain", "Hi").stdout == "\x1b[31mred\n"


def test_an_error_before_the_answer(bear: Bear, server: FakeServer) -> None:
    server.models = [samples.DEMO]
    result = bear("run", "nobody", "Hi")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(
        r"error: no model is named 'nobody' \[MODEL_NOT_FOUND\]\nhint: `bear list --all`.*\n", result.stderr
    )


def test_a_conversation_sends_what_was_said_before(
    server: FakeServer, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["Hi", "  ", "And?"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    talk.hold(talk.Talk(client, "bear-demo", {}, chat=True, quiet=True), read)
    assert said(server.last(inference.GenerateRequest)) == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "And?"),
    ]
    assert capsys.readouterr().out == "Hello\nHello\n"


def test_a_conversation_goes_on_after_an_error(
    server: FakeServer, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    def script() -> Iterator[str]:
        server.refusal = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "too long", "CONTEXT_LENGTH_EXCEEDED")
        yield "a long text"
        server.refusal = None
        yield "Hi"

    lines = script()

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    talk.hold(talk.Talk(client, "bear-demo", {}, chat=True, quiet=True), read)
    assert said(server.last(inference.GenerateRequest)) == [("user", "Hi")]
    assert "error: too long [CONTEXT_LENGTH_EXCEEDED]" in capsys.readouterr().err


def test_the_download_and_the_load_are_shown_where_a_person_looks(
    server: FakeServer, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[types.ModelStatus] = []
    monkeypatch.setattr(ModelBar, "live", True)
    monkeypatch.setattr(ModelBar, "update", lambda bar, status: seen.append(status))
    server.progress = [samples.COMING.status, samples.LOADING]
    talk.Talk(client, "plain", {}, chat=False).answer("Hi")
    assert server.last(inference.GenerateRequest).output.queue_progress
    assert seen == server.progress
    assert capsys.readouterr().out == "Hello\n"


def test_the_place_in_the_queue_is_shown_where_a_person_looks(
    server: FakeServer, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[str, inference.Queued]] = []
    monkeypatch.setattr(ModelBar, "live", True)
    monkeypatch.setattr(ModelBar, "update_queue", lambda bar, name, queued: seen.append((name, queued)))
    server.places = [inference.Queued(position=1), inference.Queued(estimated_wait_seconds=2)]
    talk.Talk(client, "plain", {}, chat=False).answer("Hi")
    assert seen == [("plain", place) for place in server.places]
    assert capsys.readouterr().out == "Hello\n"


def test_can_chat_of_a_model_that_is_not_here_asks_the_hub(server: FakeServer, client: Client) -> None:
    remote = types.Model(name="owner/tiny-GGUF/tiny.Q4_K_M.gguf", capabilities=[types.MODEL_CAPABILITY_CHAT])
    server.models = [samples.TINY, remote]
    assert talk.can_chat(client, "tiny")


def test_can_chat_goes_by_the_capability(server: FakeServer, client: Client) -> None:
    server.models = [
        types.Model(name="chat", capabilities=[types.MODEL_CAPABILITY_CHAT]),
        types.Model(name="base"),
    ]
    assert talk.can_chat(client, "chat")
    assert not talk.can_chat(client, "base")


def test_who_may_only_generate_is_taken_to_chat(server: FakeServer, client: Client) -> None:
    server.refusal = Refusal(
        grpc.StatusCode.PERMISSION_DENIED,
        "GetModel needs the scope models:read",
        "SCOPE_MISSING",
        metadata={"method": "/bear_grpc.v1.ModelService/GetModel", "scope": "models:read"},
    )
    assert talk.can_chat(client, "tiny")
