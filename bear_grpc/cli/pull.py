"""`bear pull`: a download that the server does, watched or stopped from here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from bear_grpc.cli import output, words
from bear_grpc.cli.progress import ModelBar, pull_detail, pull_stage_name
from bear_grpc.cli.session import Json, Server, connect

if TYPE_CHECKING:
    from bear_grpc.client import Client
    from bear_grpc.v1.model_service_pb2 import PullModelResponse, PullStarted
    from bear_grpc.v1.types_pb2 import Model, PullProgress

_SHA256_SHOWN = 12  # as much as tells files apart


def pull(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(help="A name of the catalog, owner/repo:QUANT or owner/repo/file.gguf[@revision]."),
    ],
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Stop the download; what has come is kept.")
    ] = False,
    json: Json = False,
    server: Server = None,
) -> None:
    """Download a model to the server and verify it. Goes on from where an earlier one stopped."""
    with connect(ctx, server) as client:
        if cancel:
            _cancel(client, name, json=json)
            return
        began = time.monotonic()
        try:
            with PullView(name, quiet=json) as view:
                completed = _follow(client, name, view)
        except KeyboardInterrupt:
            output.note(
                f"the server goes on downloading: `bear pull {name}` shows it again, "
                f"`bear pull --cancel {name}` stops it"
            )
            raise
    if json:
        output.print_json(completed)
    else:
        took = time.monotonic() - began if view.bytes_came else None
        output.say(_pulled(completed.completed.model, took))


class PullView:
    """A download as a bar where a person looks, elsewhere as a line at each tenth of it."""

    def __init__(self, name: str, *, quiet: bool = False, bar: ModelBar | None = None) -> None:
        """`quiet`: no lines."""
        self.bytes_came = False
        self._name = name
        self._bar = bar or ModelBar()
        self._lines = not quiet and not self._bar.live
        self._stage = 0
        self._tenths = 0

    def begin(self, started: PullStarted) -> None:
        """The file is known."""
        self._name = started.name or self._name
        if self._lines:
            output.note(
                f"{self._name}: {output.size(started.total_bytes)} of {words.reference(started.source)}"
            )

    def update(self, pull: PullProgress) -> None:
        """Shows how far it is."""
        self.bytes_came |= pull.completed_bytes < pull.total_bytes
        self._bar.update_pull(self._name, pull)
        if not self._lines:
            return
        tenths = 10 * pull.completed_bytes // pull.total_bytes if pull.total_bytes else 0
        if pull.stage != self._stage:
            self._tenths = tenths
        elif tenths <= self._tenths:
            return
        self._stage, self._tenths = pull.stage, max(tenths, self._tenths)
        detail = pull_detail(pull)
        done = f" {10 * tenths}%" if pull.total_bytes else ""
        output.note(f"{self._name}: {pull_stage_name(pull.stage)}{done}{', ' + detail if detail else ''}")

    def __enter__(self) -> PullView:
        return self

    def __exit__(self, *left: object) -> None:
        self._bar.close()


def _follow(client: Client, name: str, view: PullView) -> PullModelResponse:
    """Shows the download to its end; its last message."""
    from bear_grpc.client import CallFailed
    from bear_grpc.v1.types_pb2 import PULL_STAGE_VERIFYING, PullProgress

    with client.pull_model(name) as events:
        for event in events:
            if event.HasField("started"):
                view.begin(event.started)
            elif event.HasField("progress"):
                view.update(event.progress)
            elif event.HasField("verifying"):
                verifying = event.verifying
                view.update(
                    PullProgress(
                        stage=PULL_STAGE_VERIFYING,
                        completed_bytes=verifying.completed_bytes,
                        total_bytes=verifying.total_bytes,
                    )
                )
            elif event.HasField("completed"):
                return event
    raise CallFailed(f"the server ended the download of {name!r} without a word")


def _cancel(client: Client, name: str, *, json: bool) -> None:
    response = client.cancel_pull(name)
    if json:
        output.print_json(response)
    else:
        output.say(f"{name} is no longer downloaded, {output.size(response.kept_bytes)} are kept")


def _pulled(model: Model, took_s: float | None) -> str:
    how = "was here already" if took_s is None else f"is here after {output.seconds(took_s)}"
    parts = [output.size(model.size_bytes)]
    if len(model.files) > 1:
        parts.append(f"{len(model.files)} files")
    if model.sha256:
        parts.append(f"sha256 {model.sha256[:_SHA256_SHOWN]}")
    return f"{model.name} {how}: {', '.join(parts)}"
