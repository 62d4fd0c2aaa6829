"""Published schemas that packages bring with them: their files are read, their code is not run."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import referencing


def folder_of(package: str) -> Path:
    """Where an installed package lies; skips the test where it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent


def check_kubernetes(resource: dict[str, Any], version: str) -> None:
    """Against the API of a version such as `1.37`, unknown fields refused. Raises ValidationError."""
    folder = folder_of("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    group, _, api = resource["apiVersion"].rpartition("/")
    prefix = f"{group.split('.')[0]}-" if group else ""
    schema = _read(folder / f"{resource['kind'].lower()}-{prefix}{api}.json")
    registry = _definitions(folder)
    jsonschema.Draft202012Validator(schema, registry=registry).validate(resource)


def check_compose(document: dict[str, Any]) -> None:
    """Against the Compose specification. Raises ValidationError."""
    vendor = folder_of("check_jsonschema") / "builtin_schemas" / "vendor"
    jsonschema.validate(document, _read(vendor / "compose-spec.json"))


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@functools.cache
def _definitions(folder: Path) -> Any:
    resource = referencing.Resource.from_contents(_read(folder / "_definitions.json"))
    return resource @ referencing.Registry()
