"""From a client certificate to who calls."""

from __future__ import annotations

import pytest

from bear_grpc.access.caller import ALL_SCOPES, Quotas, Scope
from bear_grpc.access.certificates import EVERYBODY, Identities, Identity, names_of
from bear_grpc.params import Priority

READER = Identity(scopes=frozenset({Scope.MODELS_READ}), tenant="readers", priority="low")
ADMIN = Identity(scopes=ALL_SCOPES, models=("a", "b-*"), quotas=Quotas(concurrent_streams=3))


def id_of(identities: dict[str, Identity], *names: str) -> str | None:
    caller = Identities(identities).caller_of(names)
    return None if caller is None else f"{caller.id} of {caller.tenant}"


def test_names_are_the_alternative_ones_uris_first() -> None:
    context = {
        "transport_security_type": [b"ssl"],
        "x509_common_name": [b"spiffe://common/name"],
        "x509_subject_alternative_name": [b"a.example", b"spiffe://x/y"],
        "peer_dns": [b"a.example", b"b.example"],
        "peer_uri": [b"spiffe://x/y"],
        "peer_ip": [b"10.0.0.1"],
    }
    assert names_of(context) == ("spiffe://x/y", "a.example", "b.example", "10.0.0.1")


@pytest.mark.parametrize("context", [{}, {"transport_security_type": [b"ssl"], "x509_common_name": [b"me"]}])
def test_there_are_no_names_without_a_certificate_or_alternative_names(
    context: dict[str, list[bytes]],
) -> None:
    assert names_of(context) == ()
    assert id_of(EVERYBODY) is None


def test_a_caller_has_what_its_identity_says() -> None:
    caller = Identities({"a.example": ADMIN}).caller_of(("a.example",))
    assert caller is not None
    assert (caller.id, caller.tenant, caller.scopes) == ("a.example", "a.example", ALL_SCOPES)
    assert (caller.models, caller.priority) == (("a", "b-*"), Priority.HIGH)
    assert caller.quotas.concurrent_streams == 3
    assert Identities({"x": READER}).caller_of(("x",)) == READER.caller("x")
    assert READER.caller("x").priority is Priority.LOW


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("spiffe://x/*", "spiffe://x/y/z", True),
        ("spiffe://x/*", "spiffe://xx/y", False),
        ("spiffe://x/*", "Spiffe://x/y", False),
        ("*.example", "a.example", True),
        ("*.example", "a.example.evil", False),
        ("*", "a.example", True),
        ("*", "spiffe://x/y", False),  # what is for hosts is not for URIs
        ("*://*", "a.example", False),
    ],
)
def test_patterns_fit_whole_names_of_their_kind(pattern: str, name: str, fits: bool) -> None:
    assert (id_of({pattern: READER}, name) is not None) == fits


def test_a_whole_name_wins_over_patterns_and_earlier_patterns_over_later_ones() -> None:
    known = {"*.example": READER, "a.*": ADMIN, "a.example": ADMIN}
    assert id_of(known, "b.example", "a.example") == "a.example of a.example"
    assert id_of(known, "a.other", "b.example") == "b.example of readers"


def test_identities_can_be_replaced() -> None:
    identities = Identities({"a": READER})
    assert identities.caller_of(("a",)) is not None
    identities.replace({"b": READER})
    assert identities.caller_of(("a",)) is None
    assert identities.caller_of(("b",)) is not None


def test_where_nobody_is_asked_every_name_may_do_everything() -> None:
    for name in ("spiffe://x/y", "a.example"):
        caller = Identities(EVERYBODY).caller_of((name,))
        assert caller is not None
        assert (caller.id, caller.scopes) == (name, ALL_SCOPES)
