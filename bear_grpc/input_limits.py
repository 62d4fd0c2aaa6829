"""How much a request may bring. Each limit is a setting, and refuses by its field's name."""

from __future__ import annotations

from typing import Annotated

import msgspec

MIB = 2**20


def _between(low: float, high: float, description: str, *, reloads: bool = True) -> msgspec.Meta:
    return msgspec.Meta(ge=low, le=high, description=description, extra={"reloads": reloads})


class InputLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `[limits]` of the settings. `_s` are seconds.

    Upper bounds are what a frame to a worker can carry, and what its stacks and one message
    of an answer have room for. gRPC's own two end a call RESOURCE_EXHAUSTED without a reason.
    """

    max_message_bytes: Annotated[
        int, _between(1024, 7 * MIB, "of a gRPC message, decompressed", reloads=False)
    ] = 4 * MIB
    max_metadata_bytes: Annotated[
        int,
        _between(1024, MIB, "of all metadata of a call, 32 for each entry included", reloads=False),
    ] = 16 * 1024
    max_text_bytes: Annotated[
        int, _between(1, 6 * MIB, "of a prompt, of all chat messages, or of a text to tokenize, in UTF-8")
    ] = MIB
    max_unbroken_bytes: Annotated[
        int, _between(1, MIB, "of text without white space; some tokenizers recurse on it")
    ] = 256 * 1024
    max_messages: Annotated[int, _between(1, 65_536, "messages of a conversation")] = 1024
    max_token_ids: Annotated[int, _between(1, 3 * MIB // 2, "ids of a prompt, or to detokenize")] = MIB
    max_answers: Annotated[int, _between(1, 64, "`n`")] = 16
    max_stop_sequences: Annotated[int, _between(0, 256, "stop sequences of a request")] = 16
    max_stop_sequence_bytes: Annotated[int, _between(1, 4096, "of one of them")] = 256
    max_stop_tokens: Annotated[int, _between(0, 4096, "stop tokens of a request")] = 64
    max_logit_bias: Annotated[int, _between(0, 65_536, "biased tokens of a request")] = 1024
    max_top_logprobs: Annotated[int, _between(0, 20, "`output.top_logprobs`")] = 20
    max_constraint_bytes: Annotated[
        int, _between(1, MIB, "of a schema, a grammar, a regular expression, or all choices")
    ] = 64 * 1024
    # Compilers go down one call for each bracket, on a stack of a fixed size.
    max_constraint_depth: Annotated[
        int, _between(1, 200, "brackets of a constraint that are open at a time")
    ] = 200
    max_choices: Annotated[int, _between(1, 65_536, "choices of a constraint")] = 1024
    max_text_job_s: Annotated[
        float,
        _between(
            0.1,
            60.0,
            "template, tokens and constraint of a request, in the worker; then it is interrupted",
            reloads=False,
        ),
    ] = 2.0
    max_rendered_chars: Annotated[
        int, _between(1, 64 * MIB, "characters that a chat template may write", reloads=False)
    ] = 4 * MIB


DEFAULT_LIMITS = InputLimits()
