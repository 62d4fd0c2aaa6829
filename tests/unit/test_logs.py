"""The server's log: what lines look like, where they go, and that nothing of it can hurt the server."""

from __future__ import annotations

import io
import json
import logging
import os
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bear_grpc.config import ServerConfig
from bear_grpc.telemetry.log_file import LogFile
from bear_grpc.telemetry.log_format import as_json, as_text
from bear_grpc.telemetry.logs import FILE, LogQueue, Logs, LogWriter, dropped_lines

log = logging.getLogger("bear_grpc.test")


def record(message: str, /, *, level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("bear_grpc.test", level, "", 0, message, None, None)
    made.fields = fields
    return made


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def root() -> Iterator[None]:
    logger = logging.getLogger()
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def test_text_has_the_fields_after_the_message() -> None:
    text = as_text(record("it ends", model="a b", tokens=3, finish=["stop", "length"]))
    assert text.endswith('INFO bear_grpc.test: it ends model="a b" tokens=3 finish=stop,length')


def test_json_is_one_object_on_a_line_and_fields_cannot_take_the_place_of_its_own() -> None:
    made = record("two\nlines", model="m\n", level=logging.ERROR, message="mine", logger="mine")
    text = as_json(made)
    assert "\n" not in text
    found = json.loads(text)
    assert (found["message"], found["level"], found["model"]) == ("two\nlines", "ERROR", "m\n")
    assert found["logger"] == "bear_grpc.test"
    assert found["time"].endswith("Z")


def test_text_shows_what_would_move_a_cursor() -> None:
    text = as_text(record("\x1b[2Jgone\r\nnext", name="\x1b[31m\nforged INFO line"))
    assert "\x1b" not in text and "\r" not in text
    assert text.count("\n") == 1  # the message's own; a field has none


def test_trace_of_an_exception_is_told() -> None:
    try:
        raise RuntimeError("why")
    except RuntimeError:
        made = logging.LogRecord("x", logging.ERROR, "", 0, "failed", None, sys.exc_info())
    assert "RuntimeError: why" in as_text(made)
    assert "RuntimeError: why" in json.loads(as_json(made))["trace"]


def test_file_is_rotated_by_its_size_and_so_many_are_kept(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "logs/bear.log", 100, 3)
    for number in range(20):
        file.write(f"{number:02} " + "x" * 30)
    file.close()
    names = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert names == ["bear.log", "bear.log.1", "bear.log.2"]
    kept = [line[:2] for name in reversed(names) for line in lines(tmp_path / "logs" / name)]
    assert kept == [f"{number:02}" for number in range(14, 20)]
    assert all((tmp_path / "logs" / name).stat().st_size <= 100 for name in names)


def test_one_file_begins_anew(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "bear.log", 50, 1)
    for number in range(5):
        file.write(f"{number} " + "x" * 30)
    assert [line[0] for line in lines(tmp_path / "bear.log")] == ["4"]
    assert len(list(tmp_path.iterdir())) == 1


def test_file_that_others_took_away_is_made_again(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "bear.log", 1000, 2)
    file.write("first")
    (tmp_path / "bear.log").rename(tmp_path / "moved")
    file.write("second")
    assert lines(tmp_path / "moved") == ["first"]
    assert lines(tmp_path / "bear.log") == ["second"]


def test_two_servers_rotate_the_same_file_without_a_loss(tmp_path: Path) -> None:
    files = [LogFile(tmp_path / "bear.log", 200, 50) for _ in range(2)]
    for number in range(60):
        files[number % 2].write(f"{number:02} " + "x" * 40)
    found = {line[:2] for path in tmp_path.iterdir() for line in lines(path)}
    assert found == {f"{number:02}" for number in range(60)}
    assert max(path.stat().st_size for path in tmp_path.iterdir()) <= 200


def test_file_is_for_nobody_else(tmp_path: Path) -> None:
    LogFile(tmp_path / "logs/bear.log", 1000, 2).write("x")
    assert stat.S_IMODE((tmp_path / "logs/bear.log").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "logs").stat().st_mode) == 0o700


def test_line_that_a_full_disk_has_cut_is_followed_by_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LogFile(tmp_path / "bear.log", 1000, 2)
    file.write("before")
    room, write = [4], os.write

    def full(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        taken, room[0] = data[: room[0]], max(0, room[0] - len(data))
        return write(fd, taken)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            file.write("lost line")
    file.write("after")
    assert lines(tmp_path / "bear.log") == ["before", "lost", "after"]


def test_file_that_cannot_be_written_is_told_once_and_tried_again(tmp_path: Path) -> None:
    blocked = tmp_path / "logs"
    blocked.write_text("a file where the folder should be")
    stream, now = io.StringIO(), [0.0]
    file = LogFile(blocked / "bear.log", 1000, 2)
    writer = LogWriter(LogQueue(), stream, as_text, file, as_text, lambda: now[0])
    for number in range(5):
        writer.write(record(f"line {number}"))
        now[0] += 10
    told = stream.getvalue().splitlines()
    assert sum("cannot be written" in line for line in told) == 1
    assert sum("line " in line and "bear_grpc.test" in line for line in told) == 5
    blocked.unlink()
    writer.write(record("written"))
    assert [line.partition(": ")[2] for line in lines(blocked / "bear.log")] == ["written"]


def test_stream_that_is_closed_hurts_nobody(tmp_path: Path) -> None:
    stream = io.StringIO()
    stream.close()
    file = LogFile(tmp_path / "bear.log", 1000, 2)
    LogWriter(LogQueue(), stream, as_text, file).write(record("to the file"))
    assert json.loads(lines(tmp_path / "bear.log")[0])["message"] == "to the file"


class Stuck(io.StringIO):
    """A stream whose reader has stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.go_on.wait(20)
        return super().write(text)


def test_who_logs_never_waits_and_what_is_dropped_is_counted_and_told(root: None) -> None:
    source, stream = LogQueue(3), Stuck()
    logging.getLogger().addHandler(source)
    log.setLevel(logging.INFO)
    writer = LogWriter(source, stream, as_text)
    writer.start()
    log.info("first")
    assert stream.entered.wait(20)
    for number in range(10):
        log.info("line %d", number)
    assert source.dropped == 7 == dropped_lines()
    stream.go_on.set()
    source.queue.put(None)
    writer.join(20)
    told = stream.getvalue()
    assert "7 log lines were dropped" in told
    assert [f"line {number}" in told for number in range(10)] == [True] * 3 + [False] * 7


@pytest.mark.parametrize(
    ("format", "stream", "is_json"),
    [
        ("auto", io.StringIO, True),
        ("auto", Terminal, False),
        ("text", io.StringIO, False),
        ("json", Terminal, True),
    ],
)
def test_stderr_is_for_people_on_a_terminal_only(
    tmp_path: Path, root: None, format: str, stream: type[io.StringIO], is_json: bool
) -> None:
    out = stream()
    logs = Logs(ServerConfig(state_dir=tmp_path, log_format=format), out)  # type: ignore[arg-type]
    logs.open()
    log.warning("hello %s", "you", extra={"fields": {"model": "m"}})
    logs.close()
    last = out.getvalue().splitlines()[-1]
    assert last.startswith("{") == is_json
    assert "hello you" in last
    kept = lines(tmp_path / FILE)[-1]
    assert kept.startswith("{") == (format != "text")
    assert "hello you" in kept


def test_without_a_file_nothing_is_written(tmp_path: Path, root: None) -> None:
    logs = Logs(ServerConfig(state_dir=tmp_path, log_file=False), io.StringIO())
    logs.open()
    log.warning("hello")
    logs.close()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_cannot_be_made_costs_no_other():
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    source, stream = LogQueue(), io.StringIO()
    odd = record("odd")
    odd.fields = {"odd": Odd()}
    for each in (odd, record("the next one"), None):
        source.queue.put(each)
    LogWriter(source, stream, as_text).run()
    first, second = stream.getvalue().splitlines()
    assert "cannot be written" in first and "no text" in first
    assert second.endswith("the next one")
