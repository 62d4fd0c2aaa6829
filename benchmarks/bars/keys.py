"""The check of an API key: how long it takes, and whether its time tells why a key is refused.

Keys that are unknown, wrong, revoked and expired are checked in turn, in an order that is drawn anew for
every round. What is asked is whether somebody who sees nothing but the times could tell them apart: the
medians, and the largest distance between two distributions (Kolmogorov and Smirnov), which is held against
that of two sets of the same kind.
"""

from __future__ import annotations

import bisect
import gc
import random
import statistics
import time
from collections.abc import Iterator, Sequence

from bear_grpc.access.authentication import Authenticator
from bear_grpc.access.key import Key, digest_of, new_id_and_secret, text_of
from benchmarks.measure import Limit, Plan, Result, Row, Series, at_most, percentile
from tools.progress import status

NAME = "keys"
LIMIT_US = 50.0
KEYS = 1000  # of each kind
SAMPLES = 200_000
# A median's own scatter; and a distance at which who guesses from one time is right 55 times of 100.
RATIO, DISTANCE = 1.02, 0.1
VALID, CONTROL = "valid", "unknown id, again"
REFERENCE = "unknown id"


def run(plan: Plan) -> Iterator[Result]:
    authenticator, kinds = _keys()
    samples = plan.count(SAMPLES, SAMPLES // 20)
    with status(f"{NAME}: {samples} checks of each of {len(kinds)} kinds"):
        times = plan.undisturbed(lambda: measure(authenticator, kinds, samples))
    medians = {kind: Series([statistics.median(values)]) for kind, values in times.items()}
    valid = times[VALID]
    yield Row(NAME, "valid, median", "us", medians[VALID], limit=at_most(medians[VALID], LIMIT_US))
    yield Row(NAME, "valid, p99", "us", Series([percentile(valid, 99)]))
    reference = times[REFERENCE]
    for kind, values in times.items():
        if kind in (VALID, REFERENCE):
            continue
        ratio = medians[kind].median / medians[REFERENCE].median
        limit = Limit(f"{1 / RATIO:.2f} to {RATIO:.2f} x", 1 / RATIO <= ratio <= RATIO)
        yield Row(NAME, f"{kind}, median", "us", medians[kind], REFERENCE, medians[REFERENCE], limit)
        apart = Series([distance(values, reference)])
        yield Row(NAME, f"{kind}, distance from {REFERENCE}", "", apart, limit=at_most(apart, DISTANCE))


def _keys() -> tuple[Authenticator, dict[str, list[str]]]:
    """A server's keys, and as many texts of each kind."""
    kept: list[Key] = []
    kinds: dict[str, list[str]] = {}
    ends = {
        VALID: (None, None),
        "revoked": (None, time.time() - 60),
        "expired": (time.time() - 60, None),
        "wrong secret": (None, None),
        "wrong secret of a revoked key": (None, time.time() - 60),
        REFERENCE: (None, None),
        CONTROL: (None, None),
    }
    for kind, (expires_s, revoked_s) in ends.items():
        for _ in range(KEYS):
            key_id, secret = new_id_and_secret()
            kinds.setdefault(kind, []).append(text_of(key_id, secret))
            if kind in (REFERENCE, CONTROL):
                continue
            right = new_id_and_secret()[1] if kind.startswith("wrong") else secret
            digest = digest_of(right)
            kept.append(Key(id=key_id, secret_sha256=digest, expires_s=expires_s, revoked_s=revoked_s))
    random.shuffle(kept)
    return Authenticator(kept), kinds


def measure(
    authenticator: Authenticator, kinds: dict[str, list[str]], samples: int
) -> dict[str, list[float]]:
    """Microseconds of each check, by kind."""
    draw = random.Random(1)
    check, clock = authenticator.caller_of, time.perf_counter_ns
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    order = list(kinds)
    expected = {kind: kind == VALID for kind in kinds}
    gc.disable()
    try:
        for number in range(samples + 1000):
            draw.shuffle(order)
            for kind in order:
                text = kinds[kind][draw.randrange(KEYS)]
                start = clock()
                found = check(text)
                end = clock()
                assert (found is not None) == expected[kind]
                if number >= 1000:  # until then caches and branches are not warm
                    times[kind].append((end - start) / 1000)
    finally:
        gc.enable()
    return times


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of the two distributions, 0 to 1."""
    one, other = sorted(one), sorted(other)
    return max(
        abs(bisect.bisect_right(one, value) / len(one) - bisect.bisect_right(other, value) / len(other))
        for value in {*one, *other}
    )
