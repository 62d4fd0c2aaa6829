"""Sampling filters by their definitions, one token at a time: independent of both implementations."""

from __future__ import annotations

import math

from bear_grpc.backend.base import Vocabulary
from bear_grpc.params import SamplerKind, SamplingParams

Logit = dict[int, float]
# A breaker is the tokens that spell it: (first, then the others).
Breakers = list[tuple[int, ...]]


def softmax(logits: Logit) -> Logit:
    top = max(logits.values())
    weights = {token: math.exp(logit - top) for token, logit in logits.items()}
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def candidates(
    params: SamplingParams, row: list[float], seen: list[int], breakers: Breakers = (), *, xtc: bool = False
) -> Logit:
    """Tokens that may be drawn, with their changed logits. `seen` is all that was accepted, in order."""
    logits = dict(enumerate(row))
    for token, bias in params.logit_bias:
        logits[token] += bias
    logits = {token: logit for token, logit in logits.items() if logit > -math.inf}
    kinds = {*SamplerKind}
    if params.temperature == 0:
        kinds = {SamplerKind.PENALTIES, SamplerKind.DRY}
    elif params.mirostat:
        kinds = {SamplerKind.PENALTIES, SamplerKind.DRY, SamplerKind.TEMPERATURE}
    for kind in params.sampler_order:
        if kind not in kinds:
            continue
        if kind is SamplerKind.DRY:
            logits = dry(params, logits, seen, breakers)
        elif kind is SamplerKind.PENALTIES:
            logits = penalties(params, logits, seen)
        elif kind is SamplerKind.XTC:
            logits = without_top_choices(params, logits) if xtc and params.xtc_probability else logits
        else:
            logits = FILTERS[kind](params, logits)
    return logits


def penalties(params: SamplingParams, logits: Logit, seen: list[int]) -> Logit:
    last = in_window(seen, params.repetition_window)
    changed = dict(logits)
    for token in {*last} & {*logits}:
        logit = logits[token]
        logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        changed[token] = logit - last.count(token) * params.frequency_penalty - params.presence_penalty
    return changed


def dry(params: SamplingParams, logits: Logit, seen: list[int], breakers: Breakers) -> Logit:
    """For every token, the longest end of the text that it followed before, not reaching over a breaker."""
    text = in_window(seen, params.dry_window)
    if params.dry_multiplier == 0 or len(text) <= params.dry_allowed_length:
        return logits
    ends = [
        start + len(breaker)
        for start in range(len(text))
        for breaker in breakers
        if tuple(text[start : start + len(breaker)]) == breaker
    ]
    # The last place where one begins counts, and there the longest.
    begins = [
        start
        for start in range(len(text))
        if any(tuple(text[start : start + len(breaker)]) == breaker for breaker in breakers)
    ]
    after = max(end for end in ends if end > begins[-1]) if begins else 0
    changed = dict(logits)
    for token in logits:
        if (token,) in breakers:
            continue
        lengths = [
            length
            for place in range(1, len(text))
            if text[place] == token
            for length in range(params.dry_allowed_length, min(place, len(text) - after) + 1)
            if text[place - length : place] == text[len(text) - length :]
        ]
        if lengths:
            power = params.dry_base ** (max(lengths) - params.dry_allowed_length)
            changed[token] -= params.dry_multiplier * power
    return changed


def top_n_sigma(params: SamplingParams, logits: Logit) -> Logit:
    if params.top_n_sigma == 0:
        return logits
    mean = sum(logits.values()) / len(logits)
    deviation = math.sqrt(sum((logit - mean) ** 2 for logit in logits.values()) / len(logits))
    least = max(logits.values()) - params.top_n_sigma * deviation
    return {token: logit for token, logit in logits.items() if logit >= least}


def top_k(params: SamplingParams, logits: Logit) -> Logit:
    kept = ranked(logits)[: params.top_k or None]
    return {token: logits[token] for token in kept}


def typical_p(params: SamplingParams, logits: Logit) -> Logit:
    if params.typical_p == 1:
        return logits
    chances = {token: chance for token, chance in softmax(logits).items() if chance > 1e-34}
    entropy = -sum(chance * math.log(chance) for chance in chances.values())
    distance = {token: abs(-math.log(chance) - entropy) for token, chance in chances.items()}
    closest = sorted(distance, key=distance.__getitem__)
    return until(logits, chances, closest, lambda total: total > params.typical_p, params.min_keep)


def top_p(params: SamplingParams, logits: Logit) -> Logit:
    if params.top_p == 1:
        return logits
    return until(
        logits, softmax(logits), ranked(logits), lambda total: total >= params.top_p, params.min_keep
    )


def min_p(params: SamplingParams, logits: Logit) -> Logit:
    if params.min_p == 0:
        return logits
    chances = softmax(logits)
    least = params.min_p * max(chances.values())
    order = ranked(logits)
    return {
        token: logits[token]
        for rank, token in enumerate(order)
        if chances[token] >= least * (1 - 1e-12) or rank < params.min_keep
    }


def without_top_choices(params: SamplingParams, logits: Logit) -> Logit:
    """XTC at work: of the tokens that are likely enough, only the least likely stays."""
    chances = softmax(logits)
    likely = [token for token in ranked(logits) if chances[token] >= params.xtc_threshold]
    removed = likely[:-1]
    if params.xtc_threshold > 0.5 or len(logits) - len(removed) < params.min_keep:
        return logits
    return {token: logit for token, logit in logits.items() if token not in removed}


def temperature(params: SamplingParams, logits: Logit) -> Logit:
    if params.temperature == 0:
        return logits
    spread, divisor = params.dynamic_temperature_range, params.temperature
    if spread and len(logits) == 1:
        return logits
    if spread:
        chances = [chance for chance in softmax(logits).values() if chance]
        entropy = -sum(chance * math.log(chance) for chance in chances) / math.log(len(logits))
        low, high = max(0.0, divisor - spread), divisor + spread
        divisor = low + (high - low) * entropy**params.dynamic_temperature_exponent
    return {token: logit / divisor for token, logit in logits.items()}


FILTERS = {
    SamplerKind.TOP_N_SIGMA: top_n_sigma,
    SamplerKind.TOP_K: top_k,
    SamplerKind.TYPICAL_P: typical_p,
    SamplerKind.TOP_P: top_p,
    SamplerKind.MIN_P: min_p,
    SamplerKind.TEMPERATURE: temperature,
}


def spelled(vocabulary: Vocabulary, texts: tuple[str, ...]) -> Breakers:
    """All ways to spell the breakers: tokens that hold one, or end with a beginning of it, and the rest."""
    found = []
    for text in texts:
        data = text.encode()
        for token in range(vocabulary.size):
            piece = vocabulary.piece(token, special=True)
            if data in piece:
                found.append((token,))
                continue
            for cut in range(1, len(data)):
                if piece.endswith(data[:cut]):
                    rest = data[cut:].decode(errors="replace")
                    found.append((token, *vocabulary.tokenize(rest, add_special=False, parse_special=False)))
    return found


def in_window(seen: list[int], window: int) -> list[int]:
    return seen if window < 0 else seen[max(0, len(seen) - window) :]


def ranked(logits: Logit) -> list[int]:
    return sorted(logits, key=logits.__getitem__, reverse=True)


def until(logits, chances, order, enough, min_keep) -> Logit:
    """Tokens in order, until their chances are `enough` and they are at least `min_keep`."""
    kept, total = {}, 0.0
    for token in order:
        kept[token] = logits[token]
        total += chances[token]
        if enough(total) and len(kept) >= min_keep:
            break
    return kept
