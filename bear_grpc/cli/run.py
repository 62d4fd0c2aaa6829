"""`bear run`: one answer, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bear_grpc.cli import output
from bear_grpc.cli.progress import LoadBar
from bear_grpc.cli.session import Model, Server, connect
from bear_grpc.cli.text import read_stdin
from bear_grpc.errors import BearError

if TYPE_CHECKING:
    from bear_grpc.client import Client
    from bear_grpc.v1.inference_service_pb2 import Completed


def run(
    ctx: typer.Context,
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(help="Default: what is piped in, or a conversation."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it is, without a chat template.")] = False,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens that sum up to p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the best.")] = None,
    typical_p: Annotated[float | None, typer.Option(help="Locally typical sampling; 1 is off.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is off.")] = None,
    repetition_window: Annotated[int | None, typer.Option(help="Tokens looked back at; -1 is all.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="0 is off.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="0 is off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the answer repeatable.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to produce.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; repeatable.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the answer.")] = False,
    server: Server = None,
) -> None:
    """Print a model's answer as it comes, or hold a conversation."""
    if raw and system is not None:
        raise typer.BadParameter("--system is part of a chat; it cannot be given with --raw")
    converse = prompt is None and sys.stdin.isatty()
    if prompt is None and not converse:
        prompt = read_stdin("PROMPT")
    options = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "repetition_penalty": repetition_penalty,
        "repetition_window": repetition_window,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": stop or None,
    }
    with connect(ctx, server) as client:
        chat = not raw and (system is not None or can_chat(client, model))
        talk = Talk(client, model, options, chat=chat, system=system, quiet=quiet)
        if prompt is not None:
            talk.answer(prompt)
        else:
            hold(talk, read_line)


def can_chat(client: Client, model: str) -> bool:
    """Whether the model has a chat template."""
    from bear_grpc.v1.types_pb2 import MODEL_CAPABILITY_CHAT

    return MODEL_CAPABILITY_CHAT in client.get_model(model).model.capabilities


def hold(talk: Talk, read: Callable[[str], str]) -> None:
    """Answers line by line to the end of the input. Ctrl-C ends an answer, or at the prompt the program."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() line editing and a history
    output.note("Ctrl-D ends the conversation, Ctrl-C an answer.")
    while True:
        try:
            line = read(">>> ")
        except EOFError:
            output.note("")
            return
        if not line.strip():
            continue
        try:
            talk.answer(line)
        except KeyboardInterrupt:
            output.note("")
        except BearError as error:
            output.report(error)
            if error.reason == "SERVER_UNREACHABLE":
                raise typer.Exit(1) from None


def read_line(prompt: str) -> str:
    """A line typed in; the prompt stays off a stdout that goes elsewhere."""
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


class Talk:
    """A model, the options of its answers, and what has been said."""

    def __init__(
        self,
        client: Client,
        model: str,
        options: Mapping[str, Any],
        *,
        chat: bool,
        system: str | None = None,
        quiet: bool = False,
    ) -> None:
        self._client = client
        self._model = model
        self._options = options
        self._chat = chat
        self._quiet = quiet
        self._said = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, prompt: str) -> None:
        """Prints the answer. A prompt that got none, by an error or Ctrl-C, is as if never said."""
        asked = [*self._said, {"role": "user", "content": prompt}]
        text = self._stream({"messages": asked} if self._chat else {"prompt": prompt})
        if self._chat:
            self._said = [*asked, {"role": "assistant", "content": text}]

    def _stream(self, given: Mapping[str, Any]) -> str:
        texts: list[str] = []
        is_terminal = sys.stdout.isatty()
        completed: Completed | None = None
        bar = LoadBar()
        # Asking for progress ends gRPC's own retries, so only where someone sees it.
        show_progress = bar.live and not self._quiet
        options = {**self._options, **given, "queue_progress": show_progress or None}
        try:
            with bar, self._client.generate(self._model, **options) as events:
                for event in events:
                    kind = event.WhichOneof("event")
                    if kind == "model_progress":
                        bar.update(event.model_progress)
                    elif kind == "started":
                        bar.close()
                    elif text := event.delta.text:
                        texts.append(text)
                        sys.stdout.write(output.printable(text) if is_terminal else text)
                        sys.stdout.flush()
                    elif kind == "completed":
                        completed = event.completed
        finally:
            # What follows on stderr begins on a line of its own, whatever ended the answer.
            if texts and not texts[-1].endswith("\n"):
                sys.stdout.write("\n")
                sys.stdout.flush()
        if completed is not None and not self._quiet:
            output.note(statistics(completed))
        return "".join(texts)


def statistics(completed: Completed) -> str:
    """An answer's numbers in one line."""
    from bear_grpc.v1.inference_service_pb2 import FinishReason

    usage, timings = completed.usage, completed.timings
    cached = f" ({usage.cached_token_count} cached)" if usage.cached_token_count else ""
    reason = FinishReason.DESCRIPTOR.values_by_number.get(completed.finish_reason)
    return ", ".join(
        (
            f"{usage.prompt_token_count} prompt tokens{cached}",
            f"{usage.completion_token_count} completion tokens",
            f"{timings.decode_tokens_per_second:.1f} tokens/s",
            f"TTFT {output.seconds(timings.ttft_seconds)}",
            reason.name.removeprefix("FINISH_REASON_") if reason else str(completed.finish_reason),
        )
    )
