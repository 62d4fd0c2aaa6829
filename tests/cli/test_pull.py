"""`bear pull`: lines at each tenth, a summary at the end, and what it says when it is left."""

from __future__ import annotations

import io
import json

import grpc
import pytest
from rich.console import Console

from bear_grpc.cli import pull
from bear_grpc.cli.progress import ModelBar
from bear_grpc.client import Client, Stream
from bear_grpc.v1 import model_service_pb2 as models
from bear_grpc.v1 import types_pb2 as types
from tests.cli.conftest import Bear
from tests.client import samples
from tests.client.fake_server import FakeServer, Refusal

NAMES = ["tiny", "owner/repo:Q4_K_M", "owner/repo/dir/file.gguf@v1"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_goes_to_the_server_as_it_is(bear: Bear, server: FakeServer, name: str) -> None:
    assert bear("pull", name).exit_code == 0
    assert server.last(models.PullModelRequest) == models.PullModelRequest(name=name)


def test_the_end_tells_name_size_and_checksum(bear: Bear) -> None:
    result = bear("pull", "tiny")
    before, _, after = result.stdout.partition(" ms: ")
    assert before.startswith("tiny is here after ")
    assert after == "640 MiB, sha256 0123456789ab\n"


def test_without_a_terminal_each_stage_is_a_line(bear: Bear) -> None:
    assert bear("pull", "tiny").stderr.splitlines() == [
        "tiny: waiting for its turn",
        "tiny: 640 MiB of owner/tiny-GGUF/tiny.Q4_K_M.gguf",
        "tiny: downloading 0%, 0 B of 640 MiB",
        "tiny: downloading 50%, 320 MiB of 640 MiB, 12.5 MiB/s, 26 s left",
        "tiny: verifying 90%, 600 MiB of 640 MiB",
    ]


def test_without_a_terminal_a_tenth_is_told_once(bear: Bear, server: FakeServer) -> None:
    # Back and forth, as when a damaged part is fetched again.
    done = [*range(0, 1000, 7), *range(800, 1000, 7), 1000]
    steps = [samples.pulling(types.PULL_STAGE_DOWNLOADING, mib, 1000) for mib in done]
    server.pulled = [samples.PULL_STARTED, *steps, samples.PULL_COMPLETED]
    _, *lines = bear("pull", "tiny").stderr.splitlines()
    assert [line.split()[2] for line in lines] == [f"{10 * tenth}%," for tenth in range(11)]


def test_on_a_terminal_there_is_a_bar_and_no_line(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, force_interactive=True, width=100)
    with Client(server.target) as client, pull.PullView("tiny", bar=ModelBar(terminal)) as view:
        pull._follow(client, "tiny", view)
    assert "tiny: verifying" in screen.getvalue()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "events",
    [
        [samples.PULL_COMPLETED],
        [
            samples.PULL_STARTED,
            samples.pulling(types.PULL_STAGE_DOWNLOADING, 640),
            samples.PULL_COMPLETED,
        ],
    ],
)
def test_a_model_that_is_here_is_said_to_be(
    bear: Bear, server: FakeServer, events: list[models.PullModelResponse]
) -> None:
    server.pulled = events
    assert bear("pull", "tiny").stdout == "tiny was here already: 640 MiB, sha256 0123456789ab\n"


def test_a_split_model_tells_how_many_files(bear: Bear, server: FakeServer) -> None:
    model = types.Model(name="big", size_bytes=1 << 30, files=[types.ModelFile(), types.ModelFile()])
    server.pulled = [models.PullModelResponse(completed=models.PullCompleted(model=model))]
    assert bear("pull", "big").stdout == "big was here already: 1.0 GiB, 2 files\n"


def test_json_is_the_last_message_and_nothing_else(bear: Bear) -> None:
    result = bear("pull", "tiny", "--json")
    assert json.loads(result.stdout)["completed"]["model"]["name"] == "tiny"
    assert result.stderr == ""


def test_an_event_of_a_later_server_is_left_out(bear: Bear, server: FakeServer) -> None:
    server.pulled = [models.PullModelResponse(), samples.PULL_COMPLETED]
    assert bear("pull", "tiny").exit_code == 0


def test_a_stream_without_an_end_is_an_error(bear: Bear, server: FakeServer) -> None:
    server.pulled = [samples.PULL_STARTED]
    result = bear("pull", "tiny")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "[CALL_FAILED]" in result.stderr


def test_cancel_stops_the_download_and_tells_what_is_kept(bear: Bear, server: FakeServer) -> None:
    result = bear("pull", "--cancel", "tiny")
    assert result.stdout == "tiny is no longer downloaded, 312 MiB are kept\n"
    assert [type(request) for request in server.requests] == [models.CancelPullRequest]
    assert json.loads(bear("pull", "--cancel", "tiny", "--json").stdout) == {"kept_bytes": str(312 << 20)}


def test_a_download_that_another_stopped_says_how_to_go_on(bear: Bear, server: FakeServer) -> None:
    server.refusal = Refusal(
        grpc.StatusCode.ABORTED, "was cancelled", "PULL_CANCELLED", metadata={"model": "tiny"}
    )
    error, hint = bear("pull", "tiny").stderr.splitlines()
    assert error == "error: was cancelled [PULL_CANCELLED]"
    assert hint == "hint: `bear pull tiny` goes on from where it stopped"


def test_ctrl_c_leaves_the_download_running_and_says_so(
    bear: Bear, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(stream: Stream[object]) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "__next__", interrupted)
    result = bear("pull", "tiny")
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == (
        "the server goes on downloading: `bear pull tiny` shows it again, "
        "`bear pull --cancel tiny` stops it\n"
    )
    assert not any(isinstance(request, models.CancelPullRequest) for request in server.requests)
