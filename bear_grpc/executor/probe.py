"""Asks a short-lived worker what only the native library knows."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ..errors import BackendError, from_record
from ..protocol import Failed, Probe, ProbeResult, ToServer
from ..types import LoadOptions
from .crash import CrashReport
from .link import WorkerLink
from .spawner import Spawner

PROBE_TIMEOUT_S = 60.0


async def probe(
    spawner: Spawner, path: Path | None = None, options: LoadOptions | None = None, cores: int = 1
) -> ProbeResult:
    """Versions and devices; with `path` also a dry load of that file, with `options` a dry context too.

    Raises what a load of the file would raise, and BackendError when the
    worker dies of it or takes longer than PROBE_TIMEOUT_S.
    """
    answer: asyncio.Future[ProbeResult] = asyncio.get_running_loop().create_future()

    def take(frame: ToServer) -> None:
        if answer.done():
            return
        if isinstance(frame, ProbeResult):
            answer.set_result(frame)
        elif isinstance(frame, Failed):
            answer.set_exception(from_record(frame.error))

    def end(report: CrashReport) -> None:
        if not answer.done():
            answer.set_exception(BackendError(f"the probe ended ({report.cause})"))

    link = await WorkerLink.start("probe", spawner, take, end)
    try:
        link.send(Probe(None if path is None else str(path), options, cores))
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            return await answer
    except TimeoutError as exc:
        raise BackendError(f"the probe took more than {PROBE_TIMEOUT_S:.0f} s") from exc
    finally:
        link.kill()
        await link.gone.wait()
