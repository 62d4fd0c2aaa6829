"""`bear run`: one answer, or a conversation."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from bear_grpc.cli.given import sampling_values, text_of_file, text_or_file
from bear_grpc.cli.load_options import KeepAlive
from bear_grpc.cli.session import ModelOrFile, Server, connect
from bear_grpc.cli.talk import Talk, can_chat, hold, read_line
from bear_grpc.cli.text import read_stdin


class Overflow(StrEnum):
    """What happens to a prompt that is too long."""

    ERROR = "error"
    TRUNCATE_LEFT = "truncate_left"
    TRUNCATE_MIDDLE = "truncate_middle"


def run(
    ctx: typer.Context,
    model: ModelOrFile,
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
    top_n_sigma: Annotated[
        float | None, typer.Option(help="Keep logits this many deviations from the best; 0 is off.")
    ] = None,
    xtc_probability: Annotated[
        float | None, typer.Option(help="How often XTC drops the likeliest tokens.")
    ] = None,
    xtc_threshold: Annotated[float | None, typer.Option(help="What is likely to XTC.")] = None,
    dry_multiplier: Annotated[
        float | None, typer.Option(help="Strength of DRY against repetitions; 0 is off.")
    ] = None,
    mirostat: Annotated[int | None, typer.Option(help="Version 1 or 2; 0 is off.")] = None,
    sampling: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any field of SamplingParams; repeatable."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the answer repeatable.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to produce.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="Least tokens before the model may end.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; repeatable.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="How many answers, 1 to 16.")] = None,
    json_schema: Annotated[
        str | None, typer.Option(metavar="FILE|JSON", help="The answer is JSON of this schema.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The answer matches this expression.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The answer is this text or another choice; repeatable.")
    ] = None,
    lark: Annotated[str | None, typer.Option(metavar="FILE", help="A Lark grammar of the answer.")] = None,
    gbnf: Annotated[str | None, typer.Option(metavar="FILE", help="A GBNF grammar of the answer.")] = None,
    logprobs: Annotated[
        int | None, typer.Option(metavar="N", help="Log probabilities, and the N likeliest tokens.")
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="The prompt before the answer.")] = False,
    overflow: Annotated[Overflow | None, typer.Option(help="For a prompt that is too long.")] = None,
    keep_alive: KeepAlive = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the answer.")] = False,
    server: Server = None,
) -> None:
    """Print a model's answer as it comes, or hold a conversation."""
    if raw and system is not None:
        raise typer.BadParameter("--system is part of a chat; it cannot be given with --raw")
    converse = prompt is None and sys.stdin.isatty()
    if converse and n is not None and n > 1:
        raise typer.BadParameter("--n asks for several answers; a conversation goes on from one")
    if converse and echo:
        raise typer.BadParameter("--echo is not for a conversation: it would become part of what was said")
    if prompt is None and not converse:
        prompt = read_stdin("PROMPT")
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "repetition_penalty": repetition_penalty,
        "repetition_window": repetition_window,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "top_n_sigma": top_n_sigma,
        "xtc_probability": xtc_probability,
        "xtc_threshold": xtc_threshold,
        "dry_multiplier": dry_multiplier,
        "mirostat": mirostat,
        "seed": seed,
        **sampling_values(sampling or ()),
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "stop": stop or None,
        "n": n,
        "json_schema": text_or_file(json_schema),
        "regex": regex,
        "choices": choice or None,
        "lark": text_of_file(lark),
        "gbnf": text_of_file(gbnf),
        "logprobs": True if logprobs is not None else None,
        "top_logprobs": logprobs,
        "echo": echo or None,
        "overflow_policy": overflow.value if overflow else None,
        "keep_alive": keep_alive,
    }
    with connect(ctx, server) as client:
        chat = not raw and (system is not None or can_chat(client, model))
        talk = Talk(client, model, options, chat=chat, system=system, quiet=quiet)
        if prompt is not None:
            talk.answer(prompt)
        else:
            hold(talk, read_line)
