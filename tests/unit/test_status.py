"""Statuses: code, reason and details of every error, as the contract's table has them."""

from __future__ import annotations

from collections import Counter

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb
from google.rpc import status_pb2

from bear_grpc import errors
from bear_grpc.rpc.status import CODES, DOMAIN, to_status
from tests.helpers.errors import EXAMPLES, LEAVES

DETAILS = "grpc-status-details-bin"
# Code and details besides ErrorInfo, from the contract (`errors.proto` and the API's table of errors).
CONTRACT: dict[type[errors.BearError], tuple[str, set[str]]] = {
    errors.InvalidField: ("INVALID_ARGUMENT", {"BadRequest"}),
    errors.ContextLengthExceeded: ("INVALID_ARGUMENT", set()),
    errors.GrammarInvalid: ("INVALID_ARGUMENT", set()),
    errors.ModelNotFound: ("NOT_FOUND", {"ResourceInfo"}),
    errors.ModelFileNotFound: ("NOT_FOUND", {"ResourceInfo"}),
    errors.ModelNotLoaded: ("FAILED_PRECONDITION", {"PreconditionFailure"}),
    errors.ModelAlreadyLoaded: ("FAILED_PRECONDITION", set()),
    errors.ModelInUse: ("FAILED_PRECONDITION", set()),
    errors.ModelExists: ("ALREADY_EXISTS", {"ResourceInfo"}),
    errors.ModelFileInvalid: ("FAILED_PRECONDITION", set()),
    errors.ModelOutputInvalid: ("FAILED_PRECONDITION", set()),
    errors.RequestIdInUse: ("ALREADY_EXISTS", set()),
    errors.LoadConflict: ("ABORTED", {"RetryInfo"}),
    errors.ConstraintDeadEnd: ("ABORTED", set()),
    errors.RequestQuarantined: ("FAILED_PRECONDITION", set()),
    errors.KeyMissing: ("UNAUTHENTICATED", set()),
    errors.KeyInvalid: ("UNAUTHENTICATED", set()),
    errors.ScopeMissing: ("PERMISSION_DENIED", set()),
    errors.ModelDenied: ("PERMISSION_DENIED", set()),
    errors.PathNotAllowed: ("PERMISSION_DENIED", set()),
    errors.QueueFull: ("RESOURCE_EXHAUSTED", {"RetryInfo"}),
    errors.QuotaExceeded: ("RESOURCE_EXHAUSTED", {"RetryInfo", "QuotaFailure"}),
    errors.SlowConsumer: ("RESOURCE_EXHAUSTED", set()),
    errors.ConstraintTooCostly: ("RESOURCE_EXHAUSTED", set()),
    errors.InsufficientMemory: ("RESOURCE_EXHAUSTED", set()),
    errors.Draining: ("UNAVAILABLE", {"RetryInfo"}),
    errors.WorkerCrashed: ("UNAVAILABLE", {"RetryInfo"}),
    errors.ModelUnloaded: ("UNAVAILABLE", {"RetryInfo"}),
    errors.PullCancelled: ("ABORTED", set()),
    errors.HubAccessDenied: ("PERMISSION_DENIED", set()),
    errors.DiskFull: ("RESOURCE_EXHAUSTED", set()),
    errors.HubRateLimited: ("RESOURCE_EXHAUSTED", {"RetryInfo"}),
    errors.DeadlineUnreachable: ("DEADLINE_EXCEEDED", set()),
    errors.LoadCooldown: ("UNAVAILABLE", {"RetryInfo"}),
    errors.HubUnreachable: ("UNAVAILABLE", {"RetryInfo"}),
    errors.ChecksumMismatch: ("DATA_LOSS", set()),
    errors.HubAnswerInvalid: ("DATA_LOSS", set()),
    errors.BackendError: ("INTERNAL", set()),
    errors.EngineStartFailed: ("INTERNAL", set()),
    errors.SandboxUnavailable: ("FAILED_PRECONDITION", set()),
    errors.FeatureUnsupported: ("UNIMPLEMENTED", set()),
}
KINDS = pytest.mark.parametrize("kind", CONTRACT, ids=lambda kind: kind.__name__)


def packed(error: errors.BearError) -> status_pb2.Status:
    """The status as a client reads it from the trailing metadata."""
    metadata = dict(to_status(error).trailing_metadata)
    return status_pb2.Status.FromString(metadata[DETAILS])


def details(error: errors.BearError) -> dict[str, Message]:
    """Details by the name of their type."""
    found = {}
    for item in packed(error).details:
        kind = getattr(details_pb, item.TypeName().rpartition(".")[2])
        message = kind()
        assert item.Unpack(message)
        found[kind.__name__] = message
    return found


def test_contract_here_and_codes_there_hold_every_class_that_is_raised():
    assert {*CONTRACT} == {*LEAVES, errors.BackendError} == {*CODES}


@KINDS
def test_status_code_is_the_contracts(kind):
    status = to_status(EXAMPLES[kind]())
    assert status.code is grpc.StatusCode[CONTRACT[kind][0]] is CODES[kind]


@KINDS
def test_status_message_and_code_in_the_details_are_the_calls(kind):
    error = EXAMPLES[kind]()
    status = to_status(error)
    assert (packed(error).message, packed(error).code) == (status.details, status.code.value[0])
    assert status.details == error.message


@KINDS
def test_status_error_info_carries_reason_domain_and_metadata(kind):
    error = EXAMPLES[kind]()
    info = details(error)["ErrorInfo"]
    assert (info.reason, info.domain, dict(info.metadata)) == (kind.reason, DOMAIN, error.metadata)


@KINDS
def test_status_details_are_those_of_the_contract(kind):
    assert {*details(EXAMPLES[kind]())} == {"ErrorInfo", *CONTRACT[kind][1]}


@KINDS
def test_status_each_detail_type_comes_once(kind):
    counts = Counter(item.type_url for item in packed(EXAMPLES[kind]()).details)
    assert max(counts.values()) == 1


def test_bad_request_names_all_fields_in_order():
    violations = [errors.FieldViolation("a.b[1]", "must be 1"), errors.FieldViolation("c", "is required")]
    found = details(errors.InvalidField.of(violations))["BadRequest"]
    assert [(v.field, v.description) for v in found.field_violations] == [
        ("a.b[1]", "must be 1"),
        ("c", "is required"),
    ]


def test_retry_info_has_the_errors_delay():
    found = details(errors.QueueFull("m", 1, 2.25, waiting=1))["RetryInfo"]
    assert found.retry_delay.ToNanoseconds() == 2_250_000_000


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (errors.ModelNotFound("bear"), "bear"),
        (errors.ModelFileNotFound("/m/a.gguf"), "/m/a.gguf"),
        (errors.ModelExists("bear"), "bear"),
    ],
)
def test_resource_info_names_the_resource(error, name):
    found = details(error)["ResourceInfo"]
    assert (found.resource_type, found.resource_name) == ("bear_grpc.v1.Model", name)


def test_precondition_failure_names_the_model():
    [violation] = details(errors.ModelNotLoaded("bear"))["PreconditionFailure"].violations
    assert (violation.type, violation.subject) == ("MODEL_LOADED", "bear")


def test_status_of_an_error_that_came_as_a_record_is_the_same():
    error = errors.WorkerCrashed("bear", "SIGKILL")
    assert packed(errors.from_record(error.to_record())) == packed(error)
