"""How long a queue may be, and how much of it one of several tenants may fill."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def missing(
    limit: int,
    waiting: int,
    asked: int,
    tenant: str = "",
    held: Callable[[], Mapping[str, int]] | None = None,
) -> int:
    """How much has to leave a queue before it takes `asked` more; 0: it does.

    An empty queue takes anything. A queue that others have filled still takes a tenant's share of the
    limit: as much for each of those that are in it, as `held` tells, and twice the limit together.
    Without `held` all is one tenant's.
    """
    over = waiting + asked - limit
    if not waiting or over <= 0:
        return 0
    if held is not None and over <= limit:
        parts = held()
        if parts.get(tenant, 0) + asked <= limit // len({*parts, tenant}):
            return 0
    return min(waiting, over)
