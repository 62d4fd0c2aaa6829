"""Which scope opens which method. Every method that is served stands here; what does not is refused."""

from __future__ import annotations

from .caller import Scope

_INFERENCE = "/bear_grpc.v1.InferenceService/"
_MODELS = "/bear_grpc.v1.ModelService/"
_SERVER = "/bear_grpc.v1.ServerService/"
_HEALTH = "/grpc.health.v1.Health/"

# For everybody: probes and balancers have no key. The health of single models is not (`rpc.access`).
# Load reports, of sums only, are asked for by balancers themselves.
OPEN = frozenset(
    {
        _HEALTH + "Check",
        _HEALTH + "List",
        _HEALTH + "Watch",
        "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics",
    }
)

SCOPES: dict[str, Scope] = {
    _INFERENCE + "Generate": Scope.INFER,
    _INFERENCE + "GenerateOnce": Scope.INFER,
    _INFERENCE + "Tokenize": Scope.INFER,
    _INFERENCE + "Detokenize": Scope.INFER,
    _INFERENCE + "CountTokens": Scope.INFER,
    _MODELS + "ListModels": Scope.MODELS_READ,
    _MODELS + "GetModel": Scope.MODELS_READ,
    _MODELS + "GetModelStatus": Scope.MODELS_READ,
    _MODELS + "WatchModels": Scope.MODELS_READ,
    _MODELS + "EstimateMemory": Scope.MODELS_READ,
    _MODELS + "PullModel": Scope.MODELS_ADMIN,
    _MODELS + "CancelPull": Scope.MODELS_ADMIN,
    _MODELS + "LoadModel": Scope.MODELS_ADMIN,
    _MODELS + "UnloadModel": Scope.MODELS_ADMIN,
    _MODELS + "RegisterModel": Scope.MODELS_ADMIN,
    _MODELS + "DeleteModel": Scope.MODELS_ADMIN,
    _MODELS + "PruneModels": Scope.MODELS_ADMIN,
    _SERVER + "GetServerInfo": Scope.MODELS_READ,
    _SERVER + "GetLoad": Scope.MODELS_READ,
    _SERVER + "WatchLoad": Scope.MODELS_READ,
    _SERVER + "Drain": Scope.SERVER_ADMIN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Scope.SERVER_ADMIN,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Scope.SERVER_ADMIN,
}
