"""The bar of a download and of a load: what it shows where a person looks, and nothing elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bear_grpc.cli.load import _watching
from bear_grpc.cli.progress import ModelBar, pull_detail, pull_stage_name, short_name
from bear_grpc.client import Client
from bear_grpc.v1 import types_pb2 as types
from bear_grpc.v1.inference_service_pb2 import Queued
from tests.client import samples
from tests.client.fake_server import WAIT_S, FakeServer


class Screen:
    """A terminal of 80 columns that a bar may be drawn on."""

    def __init__(self) -> None:
        self._file = io.StringIO()
        self.console = Console(file=self._file, force_terminal=True, force_interactive=True, width=80)

    @property
    def text(self) -> str:
        return self._file.getvalue()


@pytest.fixture
def screen() -> Screen:
    return Screen()


def test_a_load_shows_stage_and_fraction(screen: Screen) -> None:
    with ModelBar(screen.console) as bar:
        bar.update(samples.LOADING)
    assert "bear-demo: reading the weights" in screen.text
    assert "45%" in screen.text


def test_a_download_shows_bytes_rate_and_time_left_on_80_columns(screen: Screen) -> None:
    with ModelBar(screen.console) as bar:
        bar.update(samples.COMING.status)
    assert "320 MiB of 640 MiB, 12.5 MiB/s, 26 s left" in screen.text
    assert "50%" in screen.text


@pytest.mark.parametrize("name", ["n" * 24, "owner/repo/" + "n" * 60 + ".gguf"])
def test_a_long_name_leaves_room_for_the_numbers(screen: Screen, name: str) -> None:
    with ModelBar(screen.console) as bar:
        bar.update_pull(name, samples.HALFWAY)
    assert "12.5 MiB/s, 26 s left" in screen.text


def test_short_name_keeps_what_tells_files_apart() -> None:
    assert short_name("tinyllama-1.1b") == "tinyllama-1.1b"
    assert short_name("some-owner/some-long-repository/a.Q4_K_M.gguf") == "a.Q4_K_M.gguf"
    assert short_name("o/" + "r" * 30 + ":Q4_K_M") == "…" + "r" * 16 + ":Q4_K_M"


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (types.PULL_STAGE_QUEUED, "tiny: waiting for its turn"),
        (types.PULL_STAGE_RESOLVING, "tiny: asking the hub"),
        (types.PULL_STAGE_VERIFYING, "tiny: verifying"),
    ],
)
def test_a_download_that_is_not_coming_says_what_it_does(
    screen: Screen, stage: types.PullStage.ValueType, words: str
) -> None:
    with ModelBar(screen.console) as bar:
        bar.update_pull("tiny", types.PullProgress(stage=stage))
    assert words in screen.text
    assert "0%" not in screen.text


@pytest.mark.parametrize(("wait_s", "words"), [(0, "tiny: waiting, 3 before"), (12.4, "about 12 s")])
def test_a_place_in_the_queue_is_shown_with_the_wait_where_it_is_known(
    screen: Screen, wait_s: float, words: str
) -> None:
    with ModelBar(screen.console) as bar:
        bar.update_queue("tiny", Queued(position=3, estimated_wait_seconds=wait_s))
    assert words in screen.text
    assert ("about" in screen.text) == (wait_s > 0)


def test_a_bar_comes_again_for_the_load_after_the_download(screen: Screen) -> None:
    here = types.ModelStatus(name="bear-demo", state=types.MODEL_STATE_AVAILABLE)
    with ModelBar(screen.console) as bar:
        for status in (samples.COMING.status, here, samples.LOADING):
            bar.update(status)
    assert screen.text.index("640 MiB") < screen.text.index("reading the weights")


def test_a_load_comes_before_a_download_beside_it(screen: Screen) -> None:
    status = types.ModelStatus()
    status.CopyFrom(samples.LOADING)
    status.pull.CopyFrom(samples.HALFWAY)
    with ModelBar(screen.console) as bar:
        bar.update(status)
    assert "reading the weights" in screen.text


def test_a_name_cannot_steer_the_terminal(screen: Screen) -> None:
    with ModelBar(screen.console) as bar:
        bar.update_pull("a\x1b]0;x\x07b", samples.HALFWAY)
    assert "\x1b]0" not in screen.text


def test_nothing_is_written_where_no_person_looks() -> None:
    file = io.StringIO()
    with ModelBar(Console(file=file)) as bar:
        bar.update(samples.LOADING)
        bar.update(samples.COMING.status)
    assert not bar.live
    assert file.getvalue() == ""


def test_a_detail_leaves_out_what_is_not_known() -> None:
    assert pull_detail(types.PullProgress()) == ""
    assert pull_detail(types.PullProgress(total_bytes=1024)) == "0 B of 1.0 KiB"


def test_every_stage_of_a_download_has_words() -> None:
    stages = [value for value in types.PullStage.values() if value]
    assert len({pull_stage_name(stage) for stage in stages} - {"pulling"}) == len(stages)


@pytest.mark.parametrize(("name", "watched"), [("bear-demo", ["bear-demo"]), ("owner/repo:Q4_K_M", [])])
def test_a_load_is_watched_while_it_lasts(
    server: FakeServer, screen: Screen, name: str, watched: list[str]
) -> None:
    with Client(server.target) as client, ModelBar(screen.console) as bar, _watching(client, name, bar):
        assert server.watched.wait(WAIT_S)
    assert [list(request.names) for request in server.requests] == [watched]  # type: ignore[attr-defined]  # the only kind


def test_a_watch_of_all_models_shows_no_other(server: FakeServer, screen: Screen) -> None:
    name = "other/bear-demo"
    with Client(server.target) as client, ModelBar(screen.console) as bar, _watching(client, name, bar):
        assert server.watched.wait(WAIT_S)
    assert screen.text == ""
