"""Who may import whom, and what may be named where: the rules of the architecture, read from the source."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import bear_grpc

PACKAGE = Path(bear_grpc.__file__).parent
MAX_LINES = 400
# A catalog is read by looking something up.
MAY_BE_LONGER = {"errors.py": 640}

# The part of each module that stands for its rules: a package, or a module beside the packages.
BOTTOM = {"types", "params", "errors", "input_limits", "load_plan", "bound", "outflow", "suspects"}
SERVER_SIDE = {"rpc", "telemetry", "executor", "models", "store", "server", "serving"}

# What a part may import of bear_grpc, besides itself. `v1` is generated; `testing` may import all.
MAY_IMPORT = {
    "errors": set(),
    "bound": set(),
    "types": {"errors"},
    "input_limits": set(),
    "params": {"errors", "input_limits"},
    "transport": set(),
    "config": {"types", "input_limits", "params", "errors", "transport", "access"},
    "reload": {"config"},
    "host": set(),
    "suspects": set(),
    "outflow": set(),
    "load_plan": {"types", "errors"},
    "protocol": {"types", "input_limits", "params", "errors"},
    "framing": {"protocol"},
    "backend": {"host", "types", "params", "errors", "protocol", "load_plan"},
    "engine": {"bound", "types", "params", "errors", "outflow", "protocol", "backend"},
    "worker": {
        "types",
        "input_limits",
        "params",
        "errors",
        "protocol",
        "framing",
        "backend",
        "engine",
        "suspects",
    },
    "executor": {
        "bound",
        "types",
        "input_limits",
        "params",
        "errors",
        "outflow",
        "protocol",
        "framing",
        "suspects",
    },
    "store": {"types", "errors"},
    "models": {"host", "types", "params", "errors", "protocol", "config", "executor", "store", "load_plan"},
    "access": {"types", "params", "errors"},
    "rpc": {
        "access",
        "bound",
        "transport",
        "types",
        "input_limits",
        "params",
        "errors",
        "protocol",
        "config",
        "executor",
        "models",
        "store",
        "v1",
        "__init__",
    },
    "telemetry": {
        "access",
        "types",
        "params",
        "errors",
        "protocol",
        "config",
        "executor",
        "models",
        "rpc",
        "__init__",
    },
    "server": {
        "access",
        "types",
        "input_limits",
        "params",
        "errors",
        "protocol",
        "config",
        "reload",
        "executor",
        "models",
        "store",
        "rpc",
        "telemetry",
        "v1",
        "__init__",
    },
    "hangups": set(),
    "serving": {"config", "errors", "executor", "hangups", "reload", "server", "telemetry"},
    "client": {"v1", "errors", "__init__"},
    "cli": {
        *("access", "client", "v1", "config", "params", "hangups", "serving", "errors", "types", "__init__"),
    },
    "demo": {"client", "cli", "v1", "__init__"},
    "v1": set(),
    "__init__": set(),
}

# Parts that may never import these packages of others, and why no part of them may.
# numpy: a quarter of the server's start, and a part of its memory.
FORBIDDEN = {
    "types": {"grpc", "google", "llama_cpp", "numpy", "asyncio"},
    "params": {"grpc", "google", "llama_cpp", "numpy", "asyncio"},
    "errors": {"grpc", "google", "llama_cpp", "numpy", "asyncio"},
    "load_plan": {"grpc", "google", "llama_cpp", "numpy", "asyncio"},
    "outflow": {"grpc", "google", "llama_cpp", "numpy", "asyncio"},
    "protocol": {"grpc", "google", "llama_cpp", "numpy", "asyncio"},
    "engine": {"grpc", "google", "llama_cpp", "asyncio", "socket"},
    "backend": {"grpc", "google", "asyncio", "socket"},
    "worker": {"grpc", "google", "llama_cpp", "asyncio", "huggingface_hub"},
    "executor": {"grpc", "google", "llama_cpp", "numpy"},
    "store": {"grpc", "google", "llama_cpp", "numpy"},
    "models": {"grpc", "google", "llama_cpp", "numpy"},
    "rpc": {"llama_cpp", "numpy"},
    "telemetry": {"llama_cpp", "numpy"},
    "server": {"llama_cpp", "numpy"},
    "serving": {"llama_cpp", "numpy"},
    "client": {"llama_cpp", "numpy"},
    "cli": {"llama_cpp", "numpy"},
    "config": {"grpc", "google", "llama_cpp", "numpy", "asyncio"},
    "transport": {"grpc", "google", "llama_cpp", "numpy", "asyncio"},
    "access": {"grpc", "google", "llama_cpp", "numpy"},
}

# OpenTelemetry has one of its own, for spans.
NAMES_STATUS_CODE = {"rpc/status.py", "telemetry/spans.py"}
# Who may touch the environment, and why.
USES_ENVIRONMENT = {
    "config/sources.py": "it is the only reader of settings",
    "executor/spawner.py": "hands the server's environment on to workers, with its own values over it",
    "cli/session.py": "sets gRPC's log level, which is read when grpc is imported",
    "cli/serve.py": "the same",
}
# Who may read the wall clock, which may jump, and what for. Deadlines and limits use the monotonic one.
USES_WALL_CLOCK = {
    "models/entry.py": "tells since when a model is in its state",
    "models/keeping.py": "tells when a model will be unloaded, which a timer does",
    "access/authentication.py": "tells whether a key has expired",
    "access/audit.py": "tells when something was done",
    "cli/audit.py": "tells how long ago that was",
    "access/keys.py": "tells when a key was made, and how long it is valid",
    "access/quotas.py": "quotas of a day end with the day",
    "rpc/usage.py": "tells on which day something was used",
    "cli/usage.py": "tells since when something was used",
    "cli/keys.py": "tells how long a key is valid",
    "worker/template.py": "templates write today's date",
    "cli/output.py": "tells how far away such a time is",
    "telemetry/spans.py": "spans are told in wall clock time",
    "telemetry/own_process.py": "tells when the server has started, as Prometheus counts it",
}
WALL_CLOCK = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.strftime"}
ONLY_IMPORTERS = {"llama_cpp": "backend/native.py", "llguidance": "backend/constraint.py"}
# The native backend: only the worker may build it, and imports it inside a function.
NATIVE = {
    "backend.native",
    "backend.llama",
    "backend.loading",
    "backend.dry",
    "backend.memory",
    "backend.sampler",
    "backend.vocabulary",
}


def modules() -> dict[str, ast.Module]:
    """Every module of the package that is written by hand, by its path."""
    paths = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "v1")
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(), str(path)) for path in paths}


MODULES = modules()
EVERY_MODULE = pytest.mark.parametrize("path", MODULES)


def part_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imports(path: str, *, at_import: bool = False) -> Iterator[str]:
    """Absolute dotted names of what a module imports, anywhere or only `at_import` of itself."""
    parents = ["bear_grpc", *path.split("/")[:-1]]
    for node in MODULES[path].body if at_import else ast.walk(MODULES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), ".".join(parents))
            for alias in node.names:
                yield f"{base}.{alias.name}"


def own_imports(path: str, *, at_import: bool = False) -> Iterator[tuple[str, str]]:
    """Part and dotted rest of what a module imports of bear_grpc."""
    for name in imports(path, at_import=at_import):
        top, _, rest = name.partition(".")
        if top == "bear_grpc":
            part = rest.split(".")[0]
            is_part = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
            yield (part if part and is_part else "__init__"), rest


def attributes(path: str) -> Iterator[str]:
    """Dotted names as the module writes them, and bare names."""
    for node in ast.walk(MODULES[path]):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Name):
            yield node.id


def test_rules_cover_every_part():
    assert {part_of(path) for path in MODULES} <= {*MAY_IMPORT, "testing"}


@EVERY_MODULE
def test_imports_run_one_way(path):
    part = part_of(path)
    if part == "testing":
        return
    used = {other for other, _ in own_imports(path)} - {part}
    assert used <= MAY_IMPORT[part]


@EVERY_MODULE
def test_imports_of_other_packages_stay_where_they_belong(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & FORBIDDEN.get(part_of(path), set())


@EVERY_MODULE
@pytest.mark.parametrize("package", ONLY_IMPORTERS)
def test_native_library_is_imported_in_one_module_only(package, path):
    named = any(name.split(".")[0] == package for name in imports(path))
    assert named == (path == ONLY_IMPORTERS[package])


@EVERY_MODULE
def test_native_backend_is_reached_by_the_worker_only_and_inside_a_function(path):
    if part_of(path) == "backend":
        return
    anywhere, at_import = (
        any(rest.startswith(name) for _, rest in found for name in NATIVE)
        for found in (own_imports(path), own_imports(path, at_import=True))
    )
    assert not anywhere or part_of(path) == "worker"
    assert not at_import


@EVERY_MODULE
def test_testing_is_imported_by_nothing(path):
    if part_of(path) != "testing":
        assert "testing" not in {part for part, _ in own_imports(path)}


@EVERY_MODULE
def test_status_codes_are_named_in_one_module_of_the_server(path):
    if part_of(path) in ("client", "cli", "demo"):
        return
    named = any("StatusCode" in name.split(".") for name in (*attributes(path), *imports(path)))
    assert named == (path in NAMES_STATUS_CODE)


@EVERY_MODULE
def test_environment_is_used_where_there_is_a_reason(path):
    """The command line reads BEAR_SERVER and the like through typer's `envvar`."""
    names = {"os.environ", "os.getenv", "os.environb", "os.putenv"}
    used = not names.isdisjoint([*attributes(path), *imports(path)])
    assert used == (path in USES_ENVIRONMENT)


@EVERY_MODULE
def test_wall_clock_is_read_where_there_is_a_reason(path):
    source = ast.unparse(MODULES[path])
    reads = WALL_CLOCK & set(attributes(path)) or re.search(
        r"\b(datetime|date)\.(now|utcnow|today)\(", source
    )
    assert bool(reads) == (path in USES_WALL_CLOCK)


@EVERY_MODULE
def test_print_is_called_by_the_command_line_only(path):
    calls = [node.func for node in ast.walk(MODULES[path]) if isinstance(node, ast.Call)]
    prints = any(isinstance(func, ast.Name) and func.id == "print" for func in calls)
    assert not prints or part_of(path) in ("cli", "demo")


@EVERY_MODULE
def test_module_is_short(path):
    assert len((PACKAGE / path).read_text().splitlines()) <= MAY_BE_LONGER.get(path, MAX_LINES)


@EVERY_MODULE
def test_module_has_a_docstring(path):
    assert ast.get_docstring(MODULES[path])


def test_server_side_never_reaches_the_native_backend_even_through_others():
    """No chain of imports leads there from the server, imports inside functions included."""
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph.setdefault(part_of(path), set()).update(part for part, _ in own_imports(path))
    seen, left = set(), {*SERVER_SIDE}
    while left:
        part = left.pop()
        seen.add(part)
        left |= graph.get(part, set()) - seen
    assert not seen & {"backend", "engine", "worker", "testing"}


@pytest.mark.parametrize("part", sorted(BOTTOM))
def test_bottom_imports_nothing_above_it(part):
    assert {other for other, _ in own_imports(f"{part}.py")} <= BOTTOM
