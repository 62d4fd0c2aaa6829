"""What the server computes for a token, against a bare grpc.aio server that sends the same messages.

First ours says it, then the echo says the same again at the same pace, round after round. The server is the
process that speaks gRPC: the worker, which computes the tokens, is not in it. Keys, quotas, metrics and logs
are on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks import echo, models, procfs, servers
from benchmarks.asks import Ask, Prompts
from benchmarks.measure import Plan, Result, Row, Series, at_most_of
from tools.progress import status

NAME = "echo"
RATIO = 1.5
STREAMS = {"micro": 16, "tinyllama": 1}
TOKENS = {"micro": 384, "tinyllama": 96}
PROMPT, CONTEXT = 16, 512


def run(plan: Plan) -> Iterator[Result]:
    for model in ("micro", plan.model("tinyllama")):
        yield _measure(plan, model)


def _measure(plan: Plan, model: str) -> Row:
    streams, tokens = STREAMS.get(model, 1), plan.count(TOKENS.get(model, 96), 48)
    rounds = plan.rounds_of(7, 1)
    ours: list[float] = []
    bare: list[float] = []
    messages = 0
    with (
        servers.equipped("--allow-path", str(models.get(model).parent)) as server,
        status(f"{NAME}, {model}: {rounds} rounds") as line,
    ):
        servers.wait_until_serving(server)
        with server.client() as client:
            servers.register(client, model, models.get(model))
            plan.settle()
            client.load_model(model, max_sequences=streams, context_length=CONTEXT)
        _cost_ms(server, _asks(model, streams, 16, 0))
        for index in range(rounds):
            line.update(f"round {index + 1}")
            asks = _asks(model, streams, tokens, index + 1)
            cost, said = plan.undisturbed(partial(_cost_ms, server, asks))
            ours.append(cost)
            messages = sum(len(each.messages) for each in said)
            with echo.echo(said) as other:
                _cost_ms(other, asks)
                bare.append(plan.undisturbed(partial(_cost_ms, other, asks))[0])
    what = f"{streams} streams, {model}" if streams > 1 else f"one stream, {model}"
    on, off = Series(ours), Series(bare)
    note = f"{streams * tokens} tokens in {messages} messages"
    return Row(NAME, what, "CPU ms/token", on, "echo", off, at_most_of(on, off, RATIO), note)


def _asks(model: str, streams: int, tokens: int, seed: int) -> list[Ask]:
    prompts = Prompts(seed, tokens)
    return [Ask(prompts.take(PROMPT), tokens, model) for _ in range(streams)]


def _cost_ms(server: servers.Bear | echo.Echo, asks: list[Ask]) -> tuple[float, list[echo.Said]]:
    """CPU milliseconds of the server for a token."""
    before_s = procfs.cpu_s(server.pid)
    said = echo.record(server.target, asks, server.key if isinstance(server, servers.Bear) else "")
    used_s = procfs.cpu_s(server.pid) - before_s
    return 1000 * used_s / sum(each.tokens for each in said), said
