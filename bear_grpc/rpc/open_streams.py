"""The bound of streams that anybody may open, without a key, and that do not end by themselves."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator

from ..bound import missing
from ..errors import QuotaExceeded

QUOTA = "concurrent_streams"
# Nobody knows when one ends.
RETRY_S = 10.0


class OpenStreams:
    """Counts the open streams of one method. Event loop only.

    A tenant that has opened as many as there may be keeps nobody else out: see `bound`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def one(self, tenant: str) -> Iterator[None]:
        """A stream of the tenant's is open. Raises QuotaExceeded if there are too many."""
        if missing(self._limit, self._open.total(), 1, tenant, lambda: self._open):
            raise QuotaExceeded(tenant, QUOTA, self._limit, RETRY_S)
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]
