"""Sampling filters by their definitions, one token at a time: independent of both implementations."""

from __future__ import annotations

import math

from bear_grpc.types import SamplingParams


def softmax(logits: dict[int, float]) -> dict[int, float]:
    top = max(logits.values())
    weights = {token: math.exp(logit - top) for token, logit in logits.items()}
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def candidates(params: SamplingParams, row: list[float], seen: list[int]) -> dict[int, float]:
    """Tokens that may be drawn, with their changed logits. `seen` is all that was accepted, in order."""
    logits = dict(enumerate(row))
    for token, bias in params.logit_bias:
        logits[token] += bias
    window = params.repetition_window
    last = seen if window < 0 else seen[len(seen) - window :] if window < len(seen) else seen
    if params.uses_penalties:
        for token in set(last):
            logit = logits[token]
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
            logits[token] = logit - last.count(token) * params.frequency_penalty - params.presence_penalty
    if params.temperature == 0:
        return logits
    if params.top_k:
        best = sorted(logits, key=logits.__getitem__, reverse=True)[: params.top_k]
        logits = {token: logits[token] for token in best}
    if params.typical_p < 1:
        logits = _typical(logits, params.typical_p)
    if params.top_p < 1:
        logits = _until(logits, softmax(logits), lambda total: total >= params.top_p)
    if params.min_p > 0:
        chances = softmax(logits)
        least = params.min_p * max(chances.values())
        logits = {token: logit for token, logit in logits.items() if chances[token] >= least}
    return {token: logit / params.temperature for token, logit in logits.items()}


def _typical(logits: dict[int, float], p: float) -> dict[int, float]:
    chances = softmax(logits)
    entropy = -sum(chance * math.log(chance) for chance in chances.values() if chance)
    distance = {
        token: abs(-math.log(chance) - entropy) if chance else math.inf for token, chance in chances.items()
    }
    closest = sorted(distance, key=distance.__getitem__)
    return _until({token: logits[token] for token in closest}, chances, lambda total: total > p, closest)


def _until(logits, chances, enough, order=None) -> dict[int, float]:
    """Tokens in order (by default the most likely first), until their chances are `enough`."""
    kept, total = {}, 0.0
    for token in order or sorted(chances, key=chances.__getitem__, reverse=True):
        kept[token] = logits[token]
        total += chances[token]
        if enough(total):
            break
    return kept
