"""How much a request may bring. Each limit is a setting, and refuses by its field's name."""

from __future__ import annotations

from typing import Annotated

import msgspec

MIB = 2**20


def _between(low: int, high: int) -> msgspec.Meta:
    return msgspec.Meta(ge=low, le=high)


class InputLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `[limits]` of the settings. `_s` are seconds.

    Upper bounds are what a frame to a worker can carry, and what its stacks and one message
    of an answer have room for.
    """

    # gRPC's own: above these a call ends RESOURCE_EXHAUSTED without a reason.
    max_message_bytes: Annotated[int, _between(1024, 7 * MIB)] = 4 * MIB
    max_metadata_bytes: Annotated[int, _between(1024, MIB)] = 16 * 1024
    # Of a prompt, of all chat messages together, or of a text to tokenize, in UTF-8.
    max_text_bytes: Annotated[int, _between(1, 6 * MIB)] = MIB
    # Of text without white space: some tokenizers recurse on it.
    max_unbroken_bytes: Annotated[int, _between(1, MIB)] = 256 * 1024
    max_messages: Annotated[int, _between(1, 65_536)] = 1024
    max_token_ids: Annotated[int, _between(1, 3 * MIB // 2)] = MIB
    max_answers: Annotated[int, _between(1, 64)] = 16
    max_stop_sequences: Annotated[int, _between(0, 256)] = 16
    max_stop_sequence_bytes: Annotated[int, _between(1, 4096)] = 256
    max_stop_tokens: Annotated[int, _between(0, 4096)] = 64
    max_logit_bias: Annotated[int, _between(0, 65_536)] = 1024
    max_top_logprobs: Annotated[int, _between(0, 20)] = 20
    max_constraint_bytes: Annotated[int, _between(1, MIB)] = 64 * 1024
    # Compilers go down one call for each bracket, on a stack of a fixed size.
    max_constraint_depth: Annotated[int, _between(1, 200)] = 200
    max_choices: Annotated[int, _between(1, 65_536)] = 1024
    # Of one job of a worker's text thread: template, tokens, constraint.
    max_text_job_s: Annotated[float, msgspec.Meta(ge=0.1, le=60.0)] = 2.0
    max_rendered_chars: Annotated[int, _between(1, 64 * MIB)] = 4 * MIB


DEFAULT_LIMITS = InputLimits()
