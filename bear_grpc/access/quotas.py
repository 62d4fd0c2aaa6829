"""What an identity may use, and what it has used of it: requests, tokens, calls at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from ..errors import QuotaExceeded
from .caller import Caller, Quotas

NO_QUOTAS = Quotas()
DAY_S = 86_400
# When one of the calls that run will end is not known.
STREAM_RETRY_S = 1.0
# Identities that are remembered before those are forgotten that nothing is counted of any more.
MAX_KEPT = 4096
# Less than any unit, more than what sums of floats are off by.
_TOLERANCE = 1e-6


class Bucket:
    """Holds up to a minute's worth of units, which come back evenly. It may be in debt."""

    __slots__ = ("_level", "_limit", "_seen_s")

    def __init__(self, per_minute: int, now_s: float) -> None:
        self._limit = per_minute
        self._level = float(per_minute)
        self._seen_s = now_s

    def wait_s(self, now_s: float) -> float:
        """How long until there is a unit; 0: there is one."""
        self._fill(now_s)
        missing = 1.0 - self._level
        return missing * 60.0 / self._limit if missing > _TOLERANCE else 0.0

    def take(self, count: int, now_s: float) -> None:
        """Takes units, whether they are there or not; gives some back if the count is below 0."""
        self._fill(now_s)
        self._level = min(self._level - count, float(self._limit))

    def is_full(self, now_s: float) -> bool:
        """Whether nothing is known of it that a new one does not know."""
        self._fill(now_s)
        return self._level >= self._limit

    def limited(self, per_minute: int, now_s: float) -> Bucket:
        """With another limit from now on, and what it holds or owes."""
        self._fill(now_s)
        changed = Bucket(per_minute, now_s)
        changed._level = min(self._level, changed._level)
        return changed

    def _fill(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._seen_s)
        self._level = min(float(self._limit), self._level + passed_s * self._limit / 60.0)
        self._seen_s = max(self._seen_s, now_s)


class _Account:
    """What one identity uses now."""

    __slots__ = ("quotas", "requests", "streams", "tokens")

    def __init__(self, quotas: Quotas, now_s: float) -> None:
        self.streams = 0
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.set(quotas, now_s)

    def set(self, quotas: Quotas, now_s: float) -> None:
        """Has these quotas from now on; what was used counts on."""
        self.quotas = quotas
        self.requests = _changed(self.requests, quotas.requests_per_minute, now_s)
        self.tokens = _changed(self.tokens, quotas.tokens_per_minute, now_s)

    def is_idle(self, now_s: float) -> bool:
        buckets = (self.requests, self.tokens)
        return not self.streams and all(each is None or each.is_full(now_s) for each in buckets)


class Admitted:
    """A call that runs. What it uses is charged as it comes to be known; `release` it at its end."""

    def __init__(self, limiter: Limiter, account: _Account, key_id: str, *, generates: bool) -> None:
        self._limiter = limiter
        self._account = account
        self._id = key_id
        self._holds_stream = generates
        self.charged = 0

    def charge(self, tokens: int) -> None:
        """It has used so many more tokens, or so many fewer than it was charged."""
        self.charged += tokens
        self._limiter.charge(self._account, self._id, tokens)

    def release(self) -> None:
        """It has ended. Again: nothing."""
        if self._holds_stream:
            self._holds_stream = False
            self._account.streams -= 1


class Limiter:
    """Holds callers to their quotas. Event loop only.

    Nobody knows how long an answer will be, so tokens are charged when they have been used, not reserved: a
    call is admitted while there are some left, runs to its end, and may leave a debt that time pays off. A
    refused call uses nothing.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        """`wall` gives seconds since 1970: it tells the day, in UTC."""
        self.clock, self.wall = clock, wall
        self._accounts: dict[str, _Account] = {}
        # Tokens by identity, of two days at most: a clock that is set back over midnight finds the old one.
        self._days: dict[int, dict[str, int]] = {}

    def restore(self, tokens: Mapping[str, int]) -> None:
        """So many tokens were used today before the server was started, by identity."""
        today = self._today()
        for key_id, count in tokens.items():
            today[key_id] = today.get(key_id, 0) + count

    def admit(self, caller: Caller, *, generates: bool) -> Admitted:
        """A call of this caller runs from now on. Raises QuotaExceeded, for the longest wait.

        What does not generate is only a request: it takes no tokens and is no stream.
        """
        now_s, quotas = self.clock(), caller.quotas
        account = self._account(caller, now_s)
        waits_s = {"requests_per_minute": account.requests.wait_s(now_s) if account.requests else 0.0}
        if generates:
            waits_s["tokens_per_minute"] = account.tokens.wait_s(now_s) if account.tokens else 0.0
            waits_s["concurrent_streams"] = _stream_wait_s(account)
            waits_s["tokens_per_day"] = self._day_wait_s(caller)
        quota, wait_s = max(waits_s.items(), key=lambda item: item[1])
        if wait_s > 0:
            # Up to the next millisecond: whoever comes back then must not be early.
            retry_after_s = math.floor(wait_s * 1000 + 1) / 1000
            raise QuotaExceeded(caller.id, quota, getattr(quotas, quota), retry_after_s)
        if account.requests is not None:
            account.requests.take(1, now_s)
        account.streams += generates
        return Admitted(self, account, caller.id, generates=generates)

    def charge(self, account: _Account, key_id: str, tokens: int) -> None:
        """For `Admitted`."""
        if account.tokens is not None:
            account.tokens.take(tokens, self.clock())
        today = self._today()
        today[key_id] = today.get(key_id, 0) + tokens

    def _account(self, caller: Caller, now_s: float) -> _Account:
        account = self._accounts.get(caller.id)
        if account is None:
            if len(self._accounts) >= MAX_KEPT:
                self._accounts = {k: a for k, a in self._accounts.items() if not a.is_idle(now_s)}
            account = self._accounts[caller.id] = _Account(caller.quotas, now_s)
        elif account.quotas != caller.quotas:
            account.set(caller.quotas, now_s)
        return account

    def _day_wait_s(self, caller: Caller) -> float:
        limit = caller.quotas.tokens_per_day
        if limit is None or self._today().get(caller.id, 0) < limit:
            return 0.0
        return DAY_S - self.wall() % DAY_S

    def _today(self) -> dict[str, int]:
        day = int(self.wall() // DAY_S)
        if day not in self._days:
            self._days[day] = {}
            if len(self._days) > 2:
                del self._days[max(self._days, key=lambda other: abs(other - day))]
        return self._days[day]


def _changed(bucket: Bucket | None, per_minute: int | None, now_s: float) -> Bucket | None:
    if per_minute is None:
        return None
    return Bucket(per_minute, now_s) if bucket is None else bucket.limited(per_minute, now_s)


def _stream_wait_s(account: _Account) -> float:
    limit = account.quotas.concurrent_streams
    return STREAM_RETRY_S if limit is not None and account.streams >= limit else 0.0
