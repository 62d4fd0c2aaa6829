"""A bare grpc.aio server that says again what ours has said, at the same pace; and the client of both.

`record` plays requests and keeps every message with its time; `echo` starts a server that answers the same
requests with these messages. It makes a message as a servicer does, sends it, and does nothing else: what it
computes is what gRPC itself takes. `python -m benchmarks.echo` is either process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from bear_grpc.client.channel import call_metadata, channel_options
from bear_grpc.v1 import inference_service_pb2 as pb
from benchmarks.asks import Ask
from benchmarks.cache import SetupError

SERVICE = "bear_grpc.v1.InferenceService"
START_TIMEOUT_S = 30.0
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Said:
    """The messages of one stream: seconds since its request, and bytes."""

    times: list[float]
    messages: list[str]  # hexadecimal

    @property
    def tokens(self) -> int:
        """What the last message counts."""
        last = pb.GenerateResponse.FromString(bytes.fromhex(self.messages[-1]))
        return last.completed.usage.completion_token_count


@dataclass(frozen=True)
class Echo:
    """A running echo."""

    target: str
    pid: int


def record(target: str, asks: Sequence[Ask], key: str = "") -> list[Said]:
    """All asks at once, from a process of its own; `key` is an API key.

    Raises:
        SetupError: a stream did not end as it should.
    """
    script = {"target": target, "key": key, "asks": [ask.__dict__ for ask in asks]}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.echo", "record"],
        input=json.dumps(script),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        raise SetupError(f"the clients ended with {done.returncode}: {done.stderr[-500:]}")
    return [Said(**each) for each in json.loads(done.stdout)]


@contextlib.contextmanager
def echo(said: Sequence[Said]) -> Iterator[Echo]:
    """The server that says it again."""
    with tempfile.TemporaryDirectory(prefix="echo-") as folder:
        script, target = Path(folder) / "said.json", f"unix:{folder}/s"
        script.write_text(json.dumps([each.__dict__ for each in said]))
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.echo", "serve", target, str(script)])
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not Path(folder, "s").exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SetupError("the echo does not come up")
                time.sleep(0.01)
            yield Echo(target, process.pid)
        finally:
            process.terminate()
            process.wait()


class _Echo:
    def __init__(self, said: Sequence[Said]) -> None:
        self._said = [
            [
                (seconds, pb.GenerateResponse.FromString(bytes.fromhex(message)))
                for seconds, message in zip(each.times, each.messages, strict=True)
            ]
            for each in said
        ]

    async def generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        began_s = time.monotonic()
        for seconds, message in self._said[int(request.request_id)]:
            if (wait_s := began_s + seconds - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            yield message


async def _serve(target: str, said: Sequence[Said]) -> None:
    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(
        _Echo(said).generate, pb.GenerateRequest.FromString, pb.GenerateResponse.SerializeToString
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Generate": handler})])
    server.add_insecure_port(target)
    await server.start()
    await server.wait_for_termination()


async def _record(target: str, key: str, asks: Sequence[Ask]) -> list[Said]:
    metadata = call_metadata(key or None)
    async with grpc.aio.insecure_channel(target, channel_options(target)) as channel:
        await channel.channel_ready()
        # Bytes as they come: reading them is not what is measured.
        generate: Any = channel.unary_stream(f"/{SERVICE}/Generate", pb.GenerateRequest.SerializeToString)

        async def one(index: int, ask: Ask) -> Said:
            said = Said([], [])
            began_s = time.monotonic()
            async for message in generate(_request(index, ask), metadata=metadata):
                said.times.append(time.monotonic() - began_s)
                said.messages.append(bytes(message).hex())
            return said

        return list(await asyncio.gather(*(one(index, ask) for index, ask in enumerate(asks))))


def _request(index: int, ask: Ask) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        model=ask.model, token_ids=pb.TokenIds(ids=ask.prompt), request_id=str(index)
    )
    request.sampling.temperature = 0.0
    request.sampling.repetition_penalty = 1.0
    request.stop.max_tokens = ask.max_tokens
    request.stop.ignore_eos = True
    return request


def main(arguments: Sequence[str]) -> int:
    if arguments[0] == "serve":
        said = [Said(**each) for each in json.loads(Path(arguments[2]).read_text())]
        asyncio.run(_serve(arguments[1], said))
        return 0
    script = json.load(sys.stdin)
    heard = asyncio.run(_record(script["target"], script["key"], [Ask(**ask) for ask in script["asks"]]))
    json.dump([each.__dict__ for each in heard], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
