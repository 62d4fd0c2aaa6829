"""The dashboard, the alert rules and the docs name metrics, labels, codes and reasons that there are."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from bear_grpc.errors import BearError
from bear_grpc.telemetry.families import FAMILIES
from bear_grpc.telemetry.series import Kind
from bear_grpc.types import ModelState
from tests.helpers.promql import read

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

# By the name that a query asks for. `up` is Prometheus' own.
METRICS = {name: metric for metric in FAMILIES.values() for name in metric.sample_names}
OF_TARGET = {"job", "instance"}


def expressions() -> Iterator[tuple[str, str]]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for rule in RULES:
        yield rule["alert"], rule["expr"]


def reasons() -> set[str]:
    found, left = set(), [BearError]
    while left:
        kind = left.pop()
        left += kind.__subclasses__()
        found.add(getattr(kind, "reason", ""))
    return found


ALLOWED = {
    "code": {code.name for code in grpc.StatusCode},
    "reason": reasons(),
    "state": {state.value for state in ModelState},
    "kind": {"prompt", "cached", "completion", "weights", "kv_cache", "compute", "overhead"},
}


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_query_names_metrics_and_labels_that_there_are(title: str, expression: str) -> None:
    query = read(expression)
    assert query.metrics
    known = set(OF_TARGET)
    for name, matchers in query.metrics:
        if name != "up":
            metric = METRICS[name]
            labels = {*metric.labels, *OF_TARGET, *({"le"} if name.endswith("_bucket") else ())}
        else:
            labels = OF_TARGET
        known |= labels
        for label, how, value in matchers:
            assert label in labels, (name, label)
            if label in ALLOWED and "$" not in value:
                values = value.split("|") if how.endswith("~") else [value]
                assert set(values) <= ALLOWED[label]
    assert query.grouped_by <= known


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_counters_are_asked_by_their_rate_and_histograms_by_quantiles_of_it(
    title: str, expression: str
) -> None:
    for name, _ in read(expression).metrics:
        metric = METRICS.get(name)
        if metric is not None and metric.kind is not Kind.GAUGE:
            assert re.search(rf"(rate|increase)\({name}\b", expression), name


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_legend_names_labels_that_the_query_leaves(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        told = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        query = read(target["expr"])
        left = set(query.grouped_by)
        if not left:
            left = {*OF_TARGET, *(label for name, _ in query.metrics for label in METRICS[name].labels)}
        assert told <= left


def test_panels_have_their_own_ids_and_places() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for one, other in itertools.combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in DASHBOARD["panels"])


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {
        METRICS[name].name
        for panel in PANELS
        for t in panel["targets"]
        for name, _ in read(t["expr"]).metrics
    }
    assert shown == FAMILIES.keys()


def test_variables_of_queries_are_those_of_the_dashboard() -> None:
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval", "__all"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) <= names
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+).*, (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            assert label in {*METRICS[metric].labels, *OF_TARGET}


def test_alerts_have_names_severities_and_summaries() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) and len(names) > 10
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]
        assert re.search(r"(==|>|<) ?[\w.]+", rule["expr"])
        told = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        query = read(rule["expr"])
        of_metrics = {label for name, _ in query.metrics if name != "up" for label in METRICS[name].labels}
        assert told <= (query.grouped_by or {*of_metrics, *OF_TARGET})


def test_docs_tell_of_every_metric() -> None:
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    told = {name: rest for name, rest in re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)}
    for metric in FAMILIES.values():
        assert metric.name in told
        for label in metric.labels:
            assert f"`{label}`" in told[metric.name], (metric.name, label)
    assert {name for name in told if name.startswith(("bear_", "gen_ai_", "process_"))} == FAMILIES.keys()


def test_query_reader_sees_what_is_wrong() -> None:
    query = read('sum by (le, a) (rate(x_total{code=~"A|B",b!="c}"}[5m])) / time() > 0.5 and y')
    assert [name for name, _ in query.metrics] == ["x_total", "y"]
    assert query.metrics[0][1] == [("code", "=~", "A|B"), ("b", "!=", "c}")]
    assert query.grouped_by == {"le", "a"}
    with pytest.raises(ValueError, match="sum"):
        read("sum(x")
