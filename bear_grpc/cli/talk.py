"""A model's answers to one prompt, or to line after line of a conversation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer

from bear_grpc.cli import output
from bear_grpc.cli.advice import report
from bear_grpc.cli.answers import Answers
from bear_grpc.cli.progress import ModelBar
from bear_grpc.cli.session import HUB_TIMEOUT_S
from bear_grpc.cli.words import reference
from bear_grpc.errors import BearError, ScopeMissing

if TYPE_CHECKING:
    from bear_grpc.client import Client


def can_chat(client: Client, model: str) -> bool:
    """Whether the model has a chat template; of one that is not here yet, its file on the hub tells.

    Who may not ask is taken to chat: of a model that has no template the answer's error says so.
    """
    from bear_grpc.v1.types_pb2 import MODEL_CAPABILITY_CHAT

    try:
        found = client.get_model(model, timeout=HUB_TIMEOUT_S).model
    except ScopeMissing:
        return True
    if not found.capabilities and found.source.HasField("hub"):
        found = client.get_model(reference(found.source.hub), timeout=HUB_TIMEOUT_S).model
    return MODEL_CAPABILITY_CHAT in found.capabilities


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
            report(error)
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
        """Shows the answers as they come; gives the first one's text."""
        answers = Answers(self._options.get("n") or 1, quiet=self._quiet)
        bar = ModelBar()
        # Asking for progress ends gRPC's own retries, so only where someone sees it.
        show_progress = bar.live and not self._quiet
        options = {**self._options, **given, "queue_progress": show_progress or None}
        try:
            with bar, self._client.generate(self._model, **options) as events:
                for event in events:
                    if event.HasField("model_progress"):
                        bar.update(event.model_progress)
                        continue
                    if event.HasField("queued"):
                        bar.update_queue(self._model, event.queued)
                        continue
                    if event.HasField("started"):
                        bar.close()
                    answers.add(event)
        finally:
            answers.close()
        return answers.text()
