"""From what a call carries to who calls."""

from __future__ import annotations

import bisect
import hmac
import os
import time
from collections.abc import Callable, Iterable, Mapping

from .caller import Caller
from .key import ID_CHARS, Key, digest_of, parse

_BEARER = "bearer "
# What is checked in the place of a text that is no key.
_NO_KEY = ("", "0" * 43)
# Sorts behind every id, and is none.
_LAST_ID = "~" * ID_CHARS


def credential_of(metadata: Mapping[str, str | bytes]) -> str | None:
    """What the call shows: `authorization: Bearer ...`, else `x-api-key: ...`; None if it shows nothing."""
    given = metadata.get("authorization", "")
    if isinstance(given, str) and given[: len(_BEARER)].lower() == _BEARER:
        return given[len(_BEARER) :].strip()
    given = metadata.get("x-api-key", "")
    return given.strip() if isinstance(given, str) and given else None


class Authenticator:
    """The keys in memory. Unknown ids, wrong secrets, revoked and expired keys take the same steps.

    The search for an unknown id ends at a key too, after as many steps, and that key is checked like any
    other. A dictionary would tell by its time which ids there are.
    """

    def __init__(self, keys: Iterable[Key] = (), clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.replace(keys)

    def replace(self, keys: Iterable[Key]) -> None:
        """These are the keys from now on."""
        last = Key(id=_LAST_ID, secret_sha256=os.urandom(32))  # no secret has this hash
        ordered = [*sorted(keys, key=lambda key: key.id), last]
        self._ids = [key.id for key in ordered]
        self._kept = [(key.id, key.secret_sha256, key.ends_s, key.caller()) for key in ordered]

    @property
    def count(self) -> int:
        """How many keys there are, those included that are no longer valid."""
        return len(self._ids) - 1

    def caller_of(self, credential: str) -> Caller | None:
        """Who has this key; None for all that is no valid key."""
        key_id, secret = parse(credential) or _NO_KEY
        kept_id, kept_sha256, ends_s, caller = self._kept[bisect.bisect_left(self._ids, key_id)]
        # No short cut between them: a wrong secret of a revoked key must look like any other.
        is_known = hmac.compare_digest(key_id, kept_id)
        is_right = hmac.compare_digest(digest_of(secret), kept_sha256)
        is_live = self._clock() < ends_s
        return caller if is_known & is_right & is_live else None

    def is_valid(self, key_id: str) -> bool:
        """Whether calls that came with this key may go on."""
        kept_id, _, ends_s, _ = self._kept[bisect.bisect_left(self._ids, key_id)]
        return kept_id == key_id and self._clock() < ends_s
