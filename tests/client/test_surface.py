"""Every RPC has a method, on both clients, with the same arguments; and how their channel is made."""

from __future__ import annotations

import inspect
import json
import math
import re
from typing import Any

import pytest

from bear_grpc.client import AsyncClient, Client
from bear_grpc.client.channel import channel_options, deadline
from bear_grpc.v1 import inference_service_pb2, model_service_pb2, server_service_pb2

SERVICES = [
    pb2.DESCRIPTOR.services_by_name[name]
    for pb2, name in (
        (inference_service_pb2, "InferenceService"),
        (model_service_pb2, "ModelService"),
        (server_service_pb2, "ServerService"),
    )
]
RENAMED = {"GetServerInfo": "server_info"}


def methods(client: type) -> dict[str, object]:
    return {
        name: value for name, value in vars(client).items() if not name.startswith("_") and callable(value)
    }


def wrapper_of(rpc: str) -> str:
    return RENAMED.get(rpc, re.sub(r"(?<!^)(?=[A-Z])", "_", rpc).lower())


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize("rpc", [rpc.name for service in SERVICES for rpc in service.methods])
def test_every_rpc_has_a_method(client: type, rpc: str) -> None:
    assert wrapper_of(rpc) in methods(client)


def test_both_clients_take_the_same_arguments() -> None:
    assert methods(Client).keys() == methods(AsyncClient).keys()
    for name, method in methods(Client).items():
        other = methods(AsyncClient)[name]
        assert callable(method)
        assert callable(other)
        assert inspect.signature(method).parameters == inspect.signature(other).parameters, name


@pytest.mark.parametrize("target", ["host:1", "ipv4:10.0.0.1:1,10.0.0.2:1"])
def test_every_method_of_the_service_config_exists(target: str) -> None:
    config = json.loads(str(dict(channel_options(target))["grpc.service_config"]))
    known = {(service.full_name, rpc.name) for service in SERVICES for rpc in service.methods}
    named = {
        (entry["service"], entry["method"]) for method in config["methodConfig"] for entry in method["name"]
    }
    assert named <= known
    assert ("bear_grpc.v1.InferenceService", "Generate") in named
    assert ("bear_grpc.v1.ModelService", "LoadModel") not in named


def test_a_target_of_several_servers_goes_round_those_that_serve() -> None:
    def config(target: str) -> dict[str, Any]:
        return dict(json.loads(str(dict(channel_options(target))["grpc.service_config"])))

    assert not config("host:1").keys() & {"loadBalancingConfig", "healthCheckConfig"}
    fleet = config("ipv4:10.0.0.1:1,10.0.0.2:1")
    assert fleet["loadBalancingConfig"] == [{"round_robin": {}}]
    assert fleet["healthCheckConfig"]["serviceName"] in [service.full_name for service in SERVICES]


def test_options_of_the_caller_win() -> None:
    options = channel_options("127.0.0.1:1", {"grpc.keepalive_time_ms": 5})
    assert dict(options)["grpc.keepalive_time_ms"] == 5
    options = channel_options("127.0.0.1:1", {"grpc.keepalive_timeout_ms": 7})
    assert dict(options)["grpc.http2.ping_timeout_ms"] == 7


def test_loopback_is_not_asked_of_a_proxy() -> None:
    assert dict(channel_options("127.0.0.1:1"))["grpc.enable_http_proxy"] == 0
    assert "grpc.enable_http_proxy" not in dict(channel_options("example.com:1"))


def test_deadline_of_the_call_comes_before_the_clients() -> None:
    assert deadline(None, 60.0) == 60.0
    assert deadline(5.0, 60.0) == 5.0
    assert deadline(math.inf, 60.0) is None
    assert deadline(None, None) is None
