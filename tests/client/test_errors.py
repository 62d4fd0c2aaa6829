"""Statuses to exceptions."""

from __future__ import annotations

import grpc
import pytest

from bear_grpc import errors
from bear_grpc.client import (
    AsyncClient,
    CallCancelled,
    CallFailed,
    Client,
    DeadlinePassed,
    ServerUnreachable,
)
from tests.client.fake_server import FakeServer, Refusal

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (Code.NOT_FOUND, "MODEL_NOT_FOUND", errors.ModelNotFound),
        (Code.FAILED_PRECONDITION, "MODEL_NOT_LOADED", errors.ModelNotLoaded),
        (Code.PERMISSION_DENIED, "PATH_NOT_ALLOWED", errors.PathNotAllowed),
        (Code.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", errors.ContextLengthExceeded),
        (Code.ABORTED, "LOAD_CONFLICT", errors.LoadConflict),
        (Code.UNIMPLEMENTED, "FEATURE_UNSUPPORTED", errors.FeatureUnsupported),
    ],
)
def test_a_reason_becomes_its_class(
    server: FakeServer, client: Client, code: grpc.StatusCode, reason: str, kind: type[errors.BearError]
) -> None:
    server.refusal = Refusal(code, "words", reason, metadata={"model": "m"})
    with pytest.raises(kind) as raised:
        client.tokenize("m", "text")
    assert type(raised.value) is kind
    assert raised.value.message == "words"
    assert raised.value.metadata == {"model": "m"}
    assert raised.value.code == code.name  # type: ignore[attr-defined]


def test_retry_info_becomes_retry_after(server: FakeServer, client: Client) -> None:
    server.refusal = Refusal(Code.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry_after_s=1.5)
    with pytest.raises(errors.QueueFull) as raised:
        client.generate_once("m", "p")
    assert raised.value.retry_after_s == 1.5


def test_bad_request_becomes_violations(server: FakeServer, client: Client) -> None:
    server.refusal = Refusal(
        Code.INVALID_ARGUMENT, "top_p: too big", "INVALID_FIELD", violations={"top_p": "too big"}
    )
    with pytest.raises(errors.InvalidField) as raised:
        client.generate_once("m", "p")
    assert raised.value.violations == (errors.FieldViolation("top_p", "too big"),)


def test_an_unknown_reason_keeps_its_name(server: FakeServer, client: Client) -> None:
    server.refusal = Refusal(Code.ABORTED, "new", "OF_A_LATER_SERVER")
    with pytest.raises(errors.BearError) as raised:
        client.server_info()
    assert raised.value.reason == "OF_A_LATER_SERVER"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.UNAVAILABLE, ServerUnreachable),
        (Code.CANCELLED, CallCancelled),
        (Code.DEADLINE_EXCEEDED, DeadlinePassed),
        (Code.UNKNOWN, CallFailed),
    ],
)
@pytest.mark.parametrize("foreign", [False, True], ids=["no ErrorInfo", "another domain"])
def test_a_status_without_our_reason_goes_by_its_code(
    server: FakeServer,
    client: Client,
    code: grpc.StatusCode,
    kind: type[errors.BearError],
    foreign: bool,
) -> None:
    server.refusal = Refusal(code, "words", "MODEL_NOT_FOUND" if foreign else None, domain="example.com")
    with pytest.raises(kind) as raised:
        client.tokenize("m", "text")
    assert type(raised.value) is kind
    assert raised.value.code == code.name  # type: ignore[attr-defined]


def test_a_stream_raises_the_same(server: FakeServer, client: Client) -> None:
    server.refusal = Refusal(Code.FAILED_PRECONDITION, "words", "MODEL_NOT_LOADED")
    with pytest.raises(errors.ModelNotLoaded):
        list(client.generate("m", "p", load_if_needed=False))


async def test_the_async_client_raises_the_same(server: FakeServer, async_client: AsyncClient) -> None:
    server.refusal = Refusal(Code.FAILED_PRECONDITION, "words", "MODEL_NOT_LOADED", metadata={"model": "m"})
    with pytest.raises(errors.ModelNotLoaded) as unary:
        await async_client.tokenize("m", "text")
    assert unary.value.metadata == {"model": "m"}
    with pytest.raises(errors.ModelNotLoaded):
        async for _ in async_client.generate("m", "p"):
            pass


def test_no_server_is_unreachable_and_says_where(tmp_path: object) -> None:
    target = f"unix:{tmp_path}/nobody"
    with Client(target) as client, pytest.raises(ServerUnreachable) as raised:
        client.server_info()
    assert raised.value.message == f"no server answers at {target}: No such file or directory"


async def test_no_server_is_unreachable_for_the_async_client(tmp_path: object) -> None:
    async with AsyncClient(f"unix:{tmp_path}/nobody") as client:
        with pytest.raises(ServerUnreachable):
            await client.server_info()


def test_a_timeout_is_a_deadline(server: FakeServer, client: Client) -> None:
    server.endless = True
    with pytest.raises(DeadlinePassed):
        list(client.generate("m", "p", timeout=0.2))
