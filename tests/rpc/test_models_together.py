"""Two models at the same time: each answers as it does alone, and they share the cores."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from bear_grpc.executor.spawner import Spawner
from bear_grpc.protocol import Frame, Share
from tests.helpers.rpc import Api, eventually, read_until, serving


async def test_two_models_at_once_answer_as_each_does_alone(api: Api, demo: str, steady: str) -> None:
    # What the demo model was taught: its greedy text does not hang on the last digits of a batch.
    questions = ["What is GGUF?", "What is bear_grpc?", "What is gRPC?", "How do I load a model?"]
    jobs = [(model, question) for question in questions for model in (demo, steady)]

    async def answer(model: str, question: str) -> str:
        given: dict[str, Any] = {"prompt": question}
        if model == demo:
            given = {"messages": [{"role": "user", "content": question}]}
        got = await api.once(model, **given, temperature=0, max_tokens=20, ignore_eos=True)
        assert got.usage.completion_token_count == 20
        assert got.started.model == model
        return got.choices[0].text

    alone = [await answer(*job) for job in jobs]
    assert await asyncio.gather(*(answer(*job) for job in jobs)) == alone
    pids = {(await api.status(model)).worker_process_id for model in (demo, steady)}
    assert len(pids) == 2


async def test_busy_models_are_told_how_many_share_the_cores(
    tmp_path: Path, spawner: Spawner, steady_file: Path
) -> None:
    told: list[Frame] = []

    async def shares() -> list[int]:
        return [frame.busy_models for frame in told if isinstance(frame, Share)]

    async with serving(tmp_path, spawner, allow_path=[steady_file.parent]) as (server, api):
        # The share is told to every worker alike: one more listener hears what they hear.
        server.manager._share.join(object(), told.append)
        for name in ("one", "two"):
            await api.register(name, steady_file)
            await api.load(name, threads=1)
        calls = [api.generate(name, max_tokens=1900, ignore_eos=True) for name in ("one", "two")]
        for call in calls:
            await read_until(call, "delta")
        assert await shares() == [1, 2]
        for call in calls:
            call.cancel()

        async def alone() -> bool:
            return await shares() == [1, 2, 1]

        await eventually(alone)
