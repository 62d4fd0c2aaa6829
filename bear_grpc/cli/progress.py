"""A load's progress as a bar on stderr, for `load` and for `run` when the model has to be loaded first."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from bear_grpc.cli import output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from bear_grpc.v1.types_pb2 import ModelStatus


class LoadBar:
    """Shows statuses in LOADING; goes away with any other. Nothing where no person looks."""

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

        if self._progress is None:
            return
        if status.state != types.MODEL_STATE_LOADING:
            self.close()
            return
        progress = status.load_progress
        self._progress.start()
        self._progress.update(
            self._progress.task_ids[0],
            description=output.printable(f"{status.name}: {stage_name(progress.stage)}"),
            # Only the weights tell how far they are; the other stages pulse.
            total=1.0 if progress.stage == types.LOAD_STAGE_WEIGHTS else None,
            completed=progress.fraction,
        )

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
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    # stdout is the answer's: rich may not route it through the bar.
    progress = Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    )
    progress.add_task("", total=1.0)
    return progress


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
