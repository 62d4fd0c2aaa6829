"""Which models a request is about, so that permission comes before existence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..store.reference import Reference

ALL_MODELS = "*"
_INFERENCE = "/bear_grpc.v1.InferenceService/"
_MODELS = "/bear_grpc.v1.ModelService/"


def _model(request: Any) -> list[str]:
    return [request.model]


def _name(request: Any) -> list[str]:
    return [request.name]


def _target(request: Any) -> list[str]:
    if request.WhichOneof("target") != "source":
        return [request.name]
    source = request.source
    return [Reference(source.repo_id, source.file, None, source.revision or "main").name]


# Methods that are about no model, or that show of all models what the caller may use, are not here.
SUBJECTS: dict[str, Callable[[Any], Iterable[str]]] = {
    _INFERENCE + "Generate": _model,
    _INFERENCE + "GenerateOnce": lambda request: [request.request.model],
    _INFERENCE + "Tokenize": _model,
    _INFERENCE + "Detokenize": _model,
    _INFERENCE + "CountTokens": _model,
    _MODELS + "GetModel": _name,
    _MODELS + "GetModelStatus": _name,
    _MODELS + "WatchModels": lambda request: request.names,
    _MODELS + "EstimateMemory": _target,
    _MODELS + "PullModel": _target,
    _MODELS + "CancelPull": _name,
    _MODELS + "LoadModel": _name,
    _MODELS + "UnloadModel": _name,
    _MODELS + "RegisterModel": lambda request: [request.name, *request.aliases],
    _MODELS + "DeleteModel": _name,
    _MODELS + "PruneModels": lambda request: [ALL_MODELS],
}
