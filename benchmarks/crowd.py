"""Many clients in one process of its own: plays a list of asks over gRPC or HTTP, and tells what each saw.

`play` starts it, `python -m benchmarks.crowd` is it. Both protocols are driven by the same asyncio code; only
how a piece of text is read from the connection differs. Connections are made before the clock starts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

import grpc

from bear_grpc.client.channel import call_metadata, channel_options
from bear_grpc.v1 import inference_service_pb2 as pb
from bear_grpc.v1.inference_service_pb2_grpc import InferenceServiceStub
from benchmarks.asks import Answer, Ask
from benchmarks.cache import SetupError

TIMEOUT_S = 900.0
LINE_LIMIT = 1 << 22


def play(
    target: str, asks: Sequence[Ask], *, key: str = "", concurrency: int = 0, may_be_silent: bool = False
) -> list[Answer]:
    """Answers in the order of the asks, from our server at a gRPC target or llama-server at `http://HOST:PORT`.

    `key` is an API key for our server.

    With `concurrency`, so many run at once at most, in the order of the list. Texts come with the answers;
    a model of random weights may write tokens without any, which is an error unless it `may_be_silent`.

    Raises:
        SetupError: the process failed, or one of the asks did.
    """
    script: dict[str, Any] = {"target": target, "key": key, "concurrency": concurrency}
    script["asks"] = [dataclasses.asdict(ask) for ask in asks]
    command = [sys.executable, "-m", "benchmarks.crowd"]
    try:
        done = subprocess.run(
            command, input=json.dumps(script), capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired as late:
        raise SetupError(f"the clients did not end within {TIMEOUT_S:.0f} s") from late
    if done.returncode:
        raise SetupError(f"the clients ended with {done.returncode}: {done.stderr[-500:]}")
    answers = [Answer(**answer) for answer in json.loads(done.stdout)]
    for index, answer in enumerate(answers):
        if answer.failed:
            raise SetupError(f"ask {index} of {len(answers)} at {target}: {answer.failed}")
        if not answer.completed and answer.cancelled_s is None:
            raise SetupError(f"ask {index} of {len(answers)} at {target} did not end")
        if answer.completed and not answer.times and asks[index].max_tokens and not may_be_silent:
            raise SetupError(f"ask {index} of {len(answers)} at {target} brought no text")
    return answers


@dataclass(frozen=True)
class Event:
    """What one message of a stream brought."""

    started: bool = False
    text: str = ""
    completed: bool = False
    tokens: int = 0
    cached_tokens: int = 0


# Sends the request and yields what comes back; leaving it ends the call.
Call = Callable[[], AsyncGenerator[Event, None]]


def grpc_call(stub: Any, ask: Ask, metadata: Any) -> Call:
    """Over the generated stub of a channel that all asks share."""
    request = pb.GenerateRequest(model=ask.model, token_ids=pb.TokenIds(ids=ask.prompt))
    request.sampling.temperature = 0.0
    request.sampling.repetition_penalty = 1.0
    request.stop.max_tokens = ask.max_tokens
    request.stop.ignore_eos = True

    async def events() -> AsyncGenerator[Event, None]:
        call = stub.Generate(request, metadata=metadata)
        try:
            async for message in call:
                kind = message.WhichOneof("event")
                if kind == "delta":
                    yield Event(text=message.delta.text)
                elif kind == "started":
                    yield Event(started=True)
                elif kind == "completed":
                    usage = message.completed.usage
                    count, cached = usage.completion_token_count, usage.cached_token_count
                    yield Event(completed=True, tokens=count, cached_tokens=cached)
        finally:
            call.cancel()

    return events


async def http_call(host: str, port: int, ask: Ask, stack: AsyncExitStack) -> Call:
    """Over a connection of its own, as llama-server's HTTP/1.1 wants one per running call."""
    reader, writer = await asyncio.open_connection(host, port, limit=LINE_LIMIT)
    stack.callback(writer.close)
    asked = {"prompt": ask.prompt, "n_predict": ask.max_tokens, "stream": True}
    asked |= {"temperature": 0, "repeat_penalty": 1.0, "ignore_eos": True}
    body = json.dumps(asked).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"

    async def events() -> AsyncGenerator[Event, None]:
        writer.write(head.encode() + body)
        try:
            async for data in _server_sent(reader):
                message = json.loads(data)
                if "error" in message:
                    raise ValueError(str(message["error"]))
                if text := message.get("content"):
                    yield Event(text=text)
                if message.get("stop"):
                    timings = message["timings"]
                    cached = int(timings.get("cache_n", 0))
                    yield Event(completed=True, tokens=int(timings["predicted_n"]), cached_tokens=cached)
        finally:
            writer.close()

    return events


async def _server_sent(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of server-sent events in a chunked body, whose chunks need not end where events do."""
    status = await reader.readline()
    while (await reader.readline()).strip():  # headers
        pass
    if status.split()[1:2] != [b"200"]:
        raise ValueError(f"{status.decode().strip()}: {(await reader.read(500)).decode(errors='replace')}")
    rest = b""
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        rest += await reader.readexactly(size)
        await reader.readexactly(2)
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            for line in event.splitlines():
                if line.startswith((b"data: ", b"error: ")) and line != b"data: [DONE]":
                    yield line.partition(b": ")[2]


class Crowd:
    """The asks of one list while they are played."""

    def __init__(
        self, asks: Sequence[Ask], connect: Callable[[Ask, AsyncExitStack], Awaitable[Call]]
    ) -> None:
        self._asks = asks
        self._connect = connect
        self._answers = [Answer() for _ in asks]
        self._ended = [asyncio.Event() for _ in asks]
        # Of each ask: after how many pieces of text who is to be woken.
        self._marks: list[dict[int, asyncio.Event]] = [{} for _ in asks]
        for ask in asks:
            if ask.after_tokens is not None:
                for other in ask.after:
                    self._marks[other].setdefault(ask.after_tokens, asyncio.Event())

    async def play(self, concurrency: int) -> list[Answer]:
        places = asyncio.Semaphore(concurrency or len(self._asks))

        async def one(index: int) -> None:
            async with places:
                await self._play(index)

        async with asyncio.TaskGroup() as group:
            for index in range(len(self._asks)):
                group.create_task(one(index))
        return self._answers

    async def _play(self, index: int) -> None:
        ask, answer = self._asks[index], self._answers[index]
        try:
            async with AsyncExitStack() as stack:
                await self._wait(ask)
                # Not before the wait: llama-server closes a connection that says nothing for some seconds.
                call = await self._connect(ask, stack)
                answer.asked_s = time.monotonic()
                await self._read(index, call)
        except (grpc.RpcError, OSError, ValueError, asyncio.IncompleteReadError) as error:
            answer.failed = f"{type(error).__name__}: {error}"
        finally:
            answer.ended_s = time.monotonic()
            self._ended[index].set()
            for mark in self._marks[index].values():  # nobody waits for text that does not come
                mark.set()

    async def _wait(self, ask: Ask) -> None:
        for other in ask.after:
            if ask.after_tokens is None:
                await self._ended[other].wait()
            else:
                await self._marks[other][ask.after_tokens].wait()
        if ask.delay_s:
            await asyncio.sleep(ask.delay_s)

    async def _read(self, index: int, call: Call) -> None:
        """Reads to the end, or until it is to be cancelled."""
        ask, answer = self._asks[index], self._answers[index]
        reading = asyncio.ensure_future(self._consume(index, call))
        if ask.cancel_s is None and ask.cancel_tokens is None and ask.cancel_with is None:
            await reading
            return
        stopping = asyncio.ensure_future(self._until_cancelled(index))
        await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not reading.done():
            answer.cancelled_s = time.monotonic()
            reading.cancel()
        await asyncio.wait((reading,))
        if not reading.cancelled():
            reading.result()

    async def _until_cancelled(self, index: int) -> None:
        ask = self._asks[index]
        if ask.cancel_with is not None:
            await self._ended[ask.cancel_with].wait()
            return
        if ask.cancel_tokens:
            await self._marks[index].setdefault(ask.cancel_tokens, asyncio.Event()).wait()
        await asyncio.sleep(ask.cancel_s or 0.0)

    async def _consume(self, index: int, call: Call) -> None:
        answer, marks = self._answers[index], self._marks[index]
        texts = []
        async with aclosing(call()) as events:
            async for event in events:
                if event.text:
                    answer.times.append(time.monotonic())
                    texts.append(event.text)
                    if mark := marks.get(len(texts)):
                        mark.set()
                elif event.started:
                    answer.started_s = time.monotonic()
                elif event.completed:
                    answer.completed = True
                    answer.tokens, answer.cached_tokens = event.tokens, event.cached_tokens
        answer.text = "".join(texts)


async def run(target: str, asks: Sequence[Ask], concurrency: int, key: str = "") -> list[Answer]:
    """Plays the asks in this process."""
    if target.startswith("http://"):
        host, _, port = target.removeprefix("http://").partition(":")
        return await Crowd(asks, lambda ask, stack: http_call(host, int(port), ask, stack)).play(concurrency)
    async with AsyncExitStack() as channels:
        stubs = {}
        for each in {target, *(ask.target or target for ask in asks)}:
            opened = grpc.aio.insecure_channel(each, channel_options(each))
            channel = await channels.enter_async_context(opened)
            await channel.channel_ready()
            stubs[each] = InferenceServiceStub(channel)

        async def connect(ask: Ask, stack: AsyncExitStack) -> Call:
            return grpc_call(stubs[ask.target or target], ask, call_metadata(key or None))

        return await Crowd(asks, connect).play(concurrency)


def main() -> int:
    script = json.load(sys.stdin)
    asks = [Ask(**ask) for ask in script["asks"]]
    answers = asyncio.run(run(script["target"], asks, script["concurrency"], script["key"]))
    json.dump([dataclasses.asdict(answer) for answer in answers], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
