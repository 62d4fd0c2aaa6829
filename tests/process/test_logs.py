"""The log of `bear serve`: on stderr, and in the state folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bear_grpc.telemetry.logs import FILE
from tests.helpers.http import get
from tests.helpers.processes import RunningServer
from tests.helpers.rpc import collect


async def one_request(server: RunningServer, path: Path) -> None:
    await server.ready()
    await server.api.register("steady", path)
    await collect(server.api.generate("steady", "a secret", max_tokens=3, ignore_eos=True))
    server.terminate()
    assert await server.ended() == 0


def requests(lines: list[str]) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in lines]
    return [each for each in found if each["logger"] == "bear_grpc.requests"]


async def test_requests_are_told_on_stderr_and_in_the_file(tmp_path: Path, steady_file: Path) -> None:
    async with RunningServer(tmp_path, environ={"BEAR_LOG_FORMAT": "auto"}) as server:
        await one_request(server, steady_file)
    kept = (tmp_path / "state" / FILE).read_text().splitlines()
    for lines in (server.lines, kept):
        [line] = [each for each in requests(lines) if each["method"].endswith("/Generate")]
        assert (line["code"], line["model"], line["completion_tokens"]) == ("OK", "steady", 3)
        assert "secret" not in "\n".join(lines)


async def test_folder_that_cannot_be_written_is_told_once_and_the_server_serves(
    tmp_path: Path, steady_file: Path
) -> None:
    (tmp_path / "state").write_text("no folder")
    async with RunningServer(tmp_path) as server:
        await one_request(server, steady_file)
    log = str(tmp_path / "state" / FILE)
    assert sum(f"{log} cannot be written" in line for line in server.lines) == 1
    assert any("Generate OK" in line for line in server.lines)


async def test_metrics_are_served_where_the_setting_says(tmp_path: Path) -> None:
    async with RunningServer(tmp_path, environ={"BEAR_METRICS_LISTEN": "127.0.0.1:0"}) as server:
        await server.ready()
        [line] = [line for line in server.lines if "metrics at http://" in line]
        address = line.partition("http://")[2].removesuffix("/metrics")
        status, _, body = await get(address, "/metrics")
        assert status == 200 and "bear_info{" in body


async def test_address_for_metrics_that_is_none_ends_with_78(tmp_path: Path) -> None:
    async with RunningServer(tmp_path, environ={"BEAR_METRICS_LISTEN": "9464"}) as server:
        assert await server.ended() == 78
    assert any("metrics_listen" in line for line in server.lines)
