"""What an API key is: its text, what is kept of it, and whom it makes a caller.

A key is `bear_<id>_<secret>`. The id is no secret: it names the key in lists and logs. The secret has 256
random bits, so that nobody can guess it, and one SHA-256 of it is all that is kept: a slow hash protects
words that people choose, and here would only make a flood of wrong keys cost more.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
import string

import msgspec

from ..params import Priority
from .caller import Caller, Quotas, Scope

PREFIX = "bear_"
ID_CHARS, SECRET_BITS = 10, 256
DIGEST_BYTES = 32
# Letters and digits only: a double click takes the whole key, and a pattern finds one that has leaked.
_ID_ALPHABET = string.ascii_lowercase + "234567"
_SECRET_ALPHABET = string.digits + string.ascii_letters
_SECRET_CHARS = math.ceil(SECRET_BITS / math.log2(len(_SECRET_ALPHABET)))
_KEY = re.compile(rf"{PREFIX}([a-z2-7]{{{ID_CHARS}}})_([0-9A-Za-z]{{{_SECRET_CHARS}}})")
_ID = re.compile(rf"[a-z2-7]{{{ID_CHARS}}}")

MAX_NAME_CHARS = 100
# The last second that has a date; seconds since 1970.
MAX_TIME_S = 253_402_300_799.0  # 9999-12-31T23:59:59Z
MAX_PATTERNS, MAX_PATTERN_CHARS = 100, 256
DEFAULT_SCOPES = frozenset({Scope.INFER, Scope.MODELS_READ})


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is kept. Times are seconds since 1970, None: never."""

    id: str
    secret_sha256: bytes
    name: str = ""
    scopes: frozenset[Scope] = DEFAULT_SCOPES
    models: tuple[str, ...] | None = None
    priority: Priority = Priority.HIGH
    quotas: Quotas = Quotas()
    created_s: float = 0.0
    expires_s: float | None = None
    revoked_s: float | None = None

    @property
    def ends_s(self) -> float:
        """When it stops being valid; infinity: never."""
        return min(math.inf if end is None else end for end in (self.expires_s, self.revoked_s))

    def state(self, now_s: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_s is not None and self.revoked_s <= now_s:
            return "revoked"
        return "expired" if self.ends_s <= now_s else "active"

    def caller(self) -> Caller:
        """Who comes with it; its tenant is the key."""
        return Caller(
            id=self.id,
            tenant=self.id,
            scopes=self.scopes,
            models=self.models,
            priority=self.priority,
            quotas=self.quotas,
        )

    def problems(self) -> list[str]:
        """What is wrong with what a person chose of it."""
        found = []
        if len(self.name) > MAX_NAME_CHARS or not self.name.isprintable():
            found.append(f"the name must have at most {MAX_NAME_CHARS} printable characters")
        if not self.scopes:
            found.append("at least one scope is needed")
        if self.models is not None:
            if not 1 <= len(self.models) <= MAX_PATTERNS:
                found.append(f"there must be 1 to {MAX_PATTERNS} patterns of models")
            if any(not 1 <= len(pattern) <= MAX_PATTERN_CHARS for pattern in self.models):
                found.append(f"a pattern of models must have 1 to {MAX_PATTERN_CHARS} characters")
        if self.expires_s is not None and self.expires_s <= self.created_s:
            found.append("the time of expiry has passed")
        if self.expires_s is not None and not self.expires_s <= MAX_TIME_S:
            found.append("the time of expiry is after the year 9999")
        for name, value in msgspec.structs.asdict(self.quotas).items():
            if value is not None and value < 1:
                found.append(f"{name} must be 1 or more, is {value}")
        return found


def new_id_and_secret() -> tuple[str, str]:
    """Both random."""
    number = secrets.randbits(SECRET_BITS)
    secret = []
    for _ in range(_SECRET_CHARS):
        number, digit = divmod(number, len(_SECRET_ALPHABET))
        secret.append(_SECRET_ALPHABET[digit])
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(ID_CHARS)), "".join(secret)


def text_of(key_id: str, secret: str) -> str:
    """The key as its owner gets it."""
    return f"{PREFIX}{key_id}_{secret}"


def parse(text: str) -> tuple[str, str] | None:
    """Id and secret; None for what cannot be a key."""
    match = _KEY.fullmatch(text)
    return None if match is None else (match[1], match[2])


def id_of(text: str) -> str | None:
    """The id in an id, in a whole key, or in a key without its secret; None where there is none."""
    bare = text.removeprefix(PREFIX).partition("_")[0]
    return bare if _ID.fullmatch(bare) else None


def digest_of(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).digest()
