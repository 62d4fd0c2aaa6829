"""From what a call carries to who calls."""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Callable, Iterable, Mapping

from .caller import Caller
from .key import Key, digest_of, parse

_BEARER = "bearer "
# Stands where no key is: the same work is done on it, and no secret has its hash.
_NOBODY_ID, _NOBODY_SECRET = "", "0" * 43


def credential_of(metadata: Mapping[str, str | bytes]) -> str | None:
    """What the call shows: `authorization: Bearer ...`, else `x-api-key: ...`; None if it shows nothing."""
    given = metadata.get("authorization", "")
    if isinstance(given, str) and given[: len(_BEARER)].lower() == _BEARER:
        return given[len(_BEARER) :].strip()
    given = metadata.get("x-api-key", "")
    return given.strip() if isinstance(given, str) and given else None


class Authenticator:
    """The keys in memory. Unknown ids, wrong secrets, revoked and expired keys take the same steps."""

    def __init__(self, keys: Iterable[Key] = (), clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._nobody = Key(id=_NOBODY_ID, secret_sha256=os.urandom(32))
        self.replace(keys)

    def replace(self, keys: Iterable[Key]) -> None:
        """These are the keys from now on."""
        self._keys = {key.id: (key.secret_sha256, key.ends_s, key.caller()) for key in keys}
        self._no_key = (self._nobody.secret_sha256, self._nobody.ends_s, self._nobody.caller())

    @property
    def count(self) -> int:
        """How many keys there are, those included that are no longer valid."""
        return len(self._keys)

    def caller_of(self, credential: str) -> Caller | None:
        """Who has this key; None for all that is no valid key."""
        key_id, secret = parse(credential) or (_NOBODY_ID, _NOBODY_SECRET)
        kept, ends_s, caller = self._keys.get(key_id, self._no_key)
        # No short cut between the two: a wrong secret of a revoked key must look like any other.
        is_right = hmac.compare_digest(digest_of(secret), kept)
        is_live = self._clock() < ends_s
        return caller if is_right & is_live else None

    def is_valid(self, key_id: str) -> bool:
        """Whether calls that came with this key may go on."""
        known = self._keys.get(key_id)
        return known is not None and self._clock() < known[1]
