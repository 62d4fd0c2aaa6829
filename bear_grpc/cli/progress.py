"""A download's or a load's progress, or a place in a queue, as a bar on stderr: `pull`, `load`, `run`."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from bear_grpc.cli import output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from bear_grpc.v1.inference_service_pb2 import Queued
    from bear_grpc.v1.types_pb2 import LoadProgress, ModelStatus, PullProgress

# Longer names would push the numbers off a line of 80 columns.
_LONGEST_NAME = 24


class ModelBar:
    """Shows a model while it is downloaded, LOADING or waited for, and goes away otherwise.

    Nothing where no person looks.
    """

    def __init__(self, console: Console | None = None) -> None:
        shown_on = console or output.console(stderr=True)
        self._progress = _progress(shown_on) if shown_on.is_interactive else None

    @property
    def live(self) -> bool:
        """Whether someone sees it."""
        return self._progress is not None

    def update(self, status: ModelStatus) -> None:
        """Shows this status; from any thread."""
        from bear_grpc.v1 import types_pb2 as types

        if status.state == types.MODEL_STATE_LOADING:
            self._show_load(status.name, status.load_progress)
        elif status.HasField("pull"):
            self.update_pull(status.name, status.pull)
        else:
            self.close()

    def update_pull(self, name: str, pull: PullProgress) -> None:
        """Shows a download; from any thread."""
        from bear_grpc.v1 import types_pb2 as types

        # That it is downloading, the rate tells.
        stage = "" if pull.stage == types.PULL_STAGE_DOWNLOADING else f": {pull_stage_name(pull.stage)}"
        self._show(
            short_name(name) + stage,
            # A download that has not begun pulses.
            total=float(pull.total_bytes) or None,
            completed=pull.completed_bytes,
            detail=pull_detail(pull),
        )

    def update_queue(self, name: str, queued: Queued) -> None:
        """Shows a request's place in the queue of a model; from any thread."""
        wait = queued.estimated_wait_seconds
        self._show(
            f"{short_name(name)}: waiting, {queued.position} before",
            total=None,
            completed=0,
            detail=f"about {output.left(wait)}" if wait > 0 else "",
        )

    def _show_load(self, name: str, load: LoadProgress) -> None:
        from bear_grpc.v1 import types_pb2 as types

        self._show(
            f"{short_name(name)}: {stage_name(load.stage)}",
            # Only the weights tell how far they are; the other stages pulse.
            total=1.0 if load.stage == types.LOAD_STAGE_WEIGHTS else None,
            completed=load.fraction,
            detail="",
        )

    def _show(self, description: str, *, total: float | None, completed: float, detail: str) -> None:
        if self._progress is None:
            return
        [task] = self._progress.tasks
        task.total = total  # None pulses; to `update` None means no change
        self._progress.update(
            task.id, description=output.printable(description), completed=completed, detail=detail
        )
        self._progress.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bar away; more than once does nothing."""
        if self._progress is not None:
            with suppress(BrokenPipeError):
                self._progress.stop()


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column
    from rich.text import Text

    class Detail(TimeElapsedColumn):
        """What a task tells of itself, or the time since its beginning."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["detail"]) if task.fields["detail"] else super().render(task)

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        Detail(table_column=Column(no_wrap=True)),  # where there is no room, the bar gives way
    )
    # stdout is the answer's: rich may not route it through the bar.
    progress = Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    )
    progress.add_task("", total=1.0, detail="")
    return progress


def short_name(name: str) -> str:
    """A name as it fits before a bar: of a file on the hub its end, which tells it from others."""
    if len(name) <= _LONGEST_NAME:
        return name
    last = name.rpartition("/")[2]
    return last if len(last) <= _LONGEST_NAME else "…" + last[1 - _LONGEST_NAME :]


def stage_name(stage: int) -> str:
    """What a load is doing, in words."""
    from bear_grpc.v1 import types_pb2 as types

    names: dict[int, str] = {
        types.LOAD_STAGE_STARTING: "starting the worker",
        types.LOAD_STAGE_WEIGHTS: "reading the weights",
        types.LOAD_STAGE_CONTEXT: "making the context",
        types.LOAD_STAGE_WARMUP: "warming up",
        types.LOAD_STAGE_MEASURING: "measuring step times",
    }
    return names.get(stage, "loading")


def pull_stage_name(stage: int) -> str:
    """What a download is doing, in words."""
    from bear_grpc.v1 import types_pb2 as types

    names: dict[int, str] = {
        types.PULL_STAGE_QUEUED: "waiting for its turn",
        types.PULL_STAGE_RESOLVING: "asking the hub",
        types.PULL_STAGE_DOWNLOADING: "downloading",
        types.PULL_STAGE_VERIFYING: "verifying",
    }
    return names.get(stage, "pulling")


def pull_detail(pull: PullProgress) -> str:
    """Bytes, and where they are known their rate and the time left."""
    parts = []
    if pull.total_bytes:
        parts.append(f"{output.size(pull.completed_bytes)} of {output.size(pull.total_bytes)}")
    if pull.bytes_per_second > 0:
        parts.append(f"{output.size(round(pull.bytes_per_second))}/s")
    if pull.remaining_seconds > 0:
        parts.append(f"{output.left(pull.remaining_seconds)} left")
    return ", ".join(parts)
