"""How a channel is made: its limits, its keepalive, what is tried again by itself. Shared by both clients."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

DEFAULT_TARGET = "127.0.0.1:50051"
# For calls that answer at once. What may load a model or runs as long as it runs has no deadline of its own:
# keepalive finds a dead connection.
DEFAULT_TIMEOUT_S = 60.0

ChannelOptions = Mapping[str, str | int]

_READS = {
    "bear_grpc.v1.ModelService": ("ListModels", "GetModel", "GetModelStatus"),
    "bear_grpc.v1.ServerService": ("GetServerInfo", "GetLoad"),
}
_GENERATE = {"bear_grpc.v1.InferenceService": ("Generate", "GenerateOnce")}
_INFERENCE = {
    "bear_grpc.v1.InferenceService": ("Generate", "GenerateOnce", "Tokenize", "Detokenize", "CountTokens")
}
_LOOPBACK = ("127.", "localhost", "[::1]", "ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1")


def _retry(methods: Mapping[str, tuple[str, ...]], attempts: int) -> dict[str, object]:
    return {
        "name": [
            {"service": service, "method": name} for service, names in methods.items() for name in names
        ],
        "retryPolicy": {
            "maxAttempts": attempts,
            "initialBackoff": "0.05s",
            "maxBackoff": "1s",
            "backoffMultiplier": 2,
            # gRPC tries a stream again only until its first message or headers have come.
            "retryableStatusCodes": ["UNAVAILABLE"],
        },
    }


SERVICE_CONFIG = {
    "methodConfig": [_retry(_READS, 4), _retry(_GENERATE, 3)],
    # When most calls fail, trying again makes it worse.
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}

# For a target with several servers: calls go round those that serve, and what one of them refuses or ends
# before its first message is tried at another. Servers that stop refuse whole queues at a time.
FLEET_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": "bear_grpc.v1.InferenceService"},
    "methodConfig": [_retry(_READS, 5), _retry(_INFERENCE, 5)],
    "retryThrottling": {"maxTokens": 1000, "tokenRatio": 1},
}


def channel_options(
    target: str, extra: ChannelOptions | None = None, server_name: str | None = None
) -> list[tuple[str, str | int]]:
    """The channel's arguments; `extra` wins. A target with a comma, `ipv4:` or `ipv6:`, is a fleet.

    `server_name` is whom the server's certificate must be for, in place of the target's host.
    """
    options: dict[str, str | int] = {
        "grpc.service_config": json.dumps(FLEET_SERVICE_CONFIG if "," in target else SERVICE_CONFIG),
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.max_receive_message_length": 64 << 20,
        "grpc.max_send_message_length": -1,  # the server's own limit decides
        # A connection of its own, and no share in another channel's back-off.
        "grpc.use_local_subchannel_pool": 1,
    }
    if "," in target:
        # A server that was restarted is found again before the next one goes.
        options |= {"grpc.initial_reconnect_backoff_ms": 100, "grpc.max_reconnect_backoff_ms": 1000}
    if target.startswith(_LOOPBACK):
        options["grpc.enable_http_proxy"] = 0  # a proxy cannot reach this machine's loopback
    if server_name is not None:
        options["grpc.ssl_target_name_override"] = server_name
    options |= extra or {}
    # What gRPC heeds in truth, and a minute by itself.
    options.setdefault("grpc.http2.ping_timeout_ms", options["grpc.keepalive_timeout_ms"])
    return [*options.items()]


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What every call carries. Raises ValueError for what cannot be a key."""
    if not api_key:
        return ()
    if not all("!" <= character <= "~" for character in api_key):
        raise ValueError("an API key has printable ASCII characters and no spaces")
    return (("authorization", f"Bearer {api_key}"),)


def deadline(given: float | None, default: float | None) -> float | None:
    """gRPC's timeout: what the call gives, else `default`; infinity is none."""
    seconds = default if given is None else given
    return None if seconds is None or math.isinf(seconds) else seconds
