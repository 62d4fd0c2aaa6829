"""`bear run`: the answer on stdout, the numbers on stderr, a conversation that remembers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import grpc
import pytest

from bear_grpc.cli import run
from bear_grpc.client import Client
from bear_grpc.v1 import inference_service_pb2 as inference
from bear_grpc.v1 import types_pb2 as types
from tests.cli.conftest import Bear
from tests.client.fake_server import DEMO, FakeServer, Refusal


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


def test_an_answer_that_ends_in_a_newline_gets_no_second(bear: Bear, server: FakeServer) -> None:
    server.texts = ["line\n"]
    assert bear("run", "plain", "Hi").stdout == "line\n"


def test_a_pipe_gets_the_text_as_it_is(bear: Bear, server: FakeServer) -> None:
    server.texts = ["\x1b[31mred"]
    assert bear("run", "plain", "Hi").stdout == "\x1b[31mred\n"


def test_an_error_before_the_answer(bear: Bear, server: FakeServer) -> None:
    server.models = [DEMO]
    result = bear("run", "nobody", "Hi")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(
        r"error: no model is named 'nobody' \[MODEL_NOT_FOUND\]\nhint: `bear list`.*\n", result.stderr
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

    run.hold(run.Talk(client, "bear-demo", {}, chat=True, quiet=True), read)
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

    run.hold(run.Talk(client, "bear-demo", {}, chat=True, quiet=True), read)
    assert said(server.last(inference.GenerateRequest)) == [("user", "Hi")]
    assert "error: too long [CONTEXT_LENGTH_EXCEEDED]" in capsys.readouterr().err


def test_can_chat_goes_by_the_capability(server: FakeServer, client: Client) -> None:
    server.models = [
        types.Model(name="chat", capabilities=[types.MODEL_CAPABILITY_CHAT]),
        types.Model(name="base"),
    ]
    assert run.can_chat(client, "chat")
    assert not run.can_chat(client, "base")
