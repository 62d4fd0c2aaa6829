"""The pictures: the same curves give the same bytes, and nothing but what was measured is drawn."""

from __future__ import annotations

import pytest

from benchmarks import pictures

pytest.importorskip("matplotlib")

CURVES = [
    {"picture": "streams", "name": "ours", "points": [[1, 40.0], [16, 120.0]]},
    {"picture": "streams", "name": "peer", "points": [[1, 41.0], [16, 60.0]]},
    {"picture": "stall", "name": "ours", "points": [[-0.5, 30.0], [0.5, 90.0]]},
]


def test_draw_twice_gives_the_same_bytes_and_no_date(tmp_path):
    first, second = (pictures.draw(CURVES, tmp_path / name) for name in ("a", "b"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert all("<dc:date>" not in file.read_text() for file in first)


def test_draw_writes_pictures_that_have_curves_with_their_names_as_text(tmp_path):
    files = pictures.draw(CURVES, tmp_path)
    assert sorted(file.name for file in files) == ["stall.svg", "streams.svg"]
    text = (tmp_path / "streams.svg").read_text()
    assert ">ours<" in text
    assert ">peer<" in text
