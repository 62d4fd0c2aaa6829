"""Histograms and their text: where a value counts, and what lines it makes."""

from __future__ import annotations

from bear_grpc.telemetry.exposition import is_open_metrics, text_of
from bear_grpc.telemetry.series import Distributions, Kind, Metric, Numbers

TIMES = Metric("times_seconds", Kind.HISTOGRAM, "Times.", ("model",), (0.1, 1.0))
CALLS = Metric("calls_total", Kind.COUNTER, "Calls.", ("code", "reason"))


def test_value_at_a_bound_counts_below_it_and_buckets_add_up() -> None:
    series = Distributions(TIMES)
    for value in (0.05, 0.1, 0.5, 1.0, 7.0):
        series.of("a").observe(value)
    assert series.of("a").counts == [2, 2, 1]
    lines = text_of([series.taken()]).splitlines()[2:]
    assert lines[:3] == [
        'times_seconds_bucket{model="a",le="0.1"} 2.0',
        'times_seconds_bucket{model="a",le="1.0"} 4.0',
        'times_seconds_bucket{model="a",le="+Inf"} 5.0',
    ]
    assert lines[3] == 'times_seconds_count{model="a"} 5.0'
    assert float(lines[4].rpartition(" ")[2]) == sum((0.05, 0.1, 0.5, 1.0, 7.0))


def test_label_is_escaped_and_left_out_when_it_is_empty() -> None:
    series = Numbers(CALLS)
    series.add('a"b\\c\nd', "")
    assert text_of([series.taken()]).splitlines()[-1] == 'calls_total{code="a\\"b\\\\c\\nd"} 1'


def test_what_is_taken_does_not_change() -> None:
    series = Distributions(TIMES)
    series.of("a").observe(0.5)
    taken = series.taken()
    series.of("a").observe(0.5)
    assert taken.values == [(("a",), (0, 1, 0, 0.5))]


def test_open_metrics_is_for_who_prefers_it() -> None:
    assert is_open_metrics("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.4")
    assert not is_open_metrics("application/openmetrics-text;q=0.2,text/plain;q=0.3,*/*;q=0.1")
    assert not any(map(is_open_metrics, ("", "*/*", "text/plain", "application/openmetrics-text;q=x")))
