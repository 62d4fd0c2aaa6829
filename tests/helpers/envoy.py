"""The Envoy configuration that is shipped, run before servers of a test."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import yaml

from tests.helpers.rpc import eventually

ENVOY = Path(sys.executable).with_name("envoy")
SHIPPED = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"


def shipped() -> dict[str, Any]:
    """The file as it is in the repository."""
    found: dict[str, Any] = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    return found


def here(config: dict[str, Any], descriptors: Path, **servers: str) -> dict[str, Any]:
    """With addresses of this machine: `servers` by the name of their cluster, ports that are free."""
    free = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}
    resources = config["static_resources"]
    config["admin"]["address"] = resources["listeners"][0]["address"] = free
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    transcoder = next(f for f in manager["http_filters"] if f["name"].endswith("json_transcoder"))
    transcoder["typed_config"]["proto_descriptor"] = str(descriptors)
    for cluster in resources["clusters"]:
        host, _, port = servers[cluster["name"].replace("-", "_")].rpartition(":")
        (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        place = endpoint["endpoint"]["address"]["socket_address"]
        place["address"], place["port_value"] = host, int(port)
    return config


@asynccontextmanager
async def running(folder: Path, config: dict[str, Any]) -> AsyncIterator[str]:
    """Envoy with this configuration; gives the URL of its listener once all clusters are healthy."""
    file, admin, output = folder / "envoy.json", folder / "admin.txt", folder / "envoy.log"
    file.write_bytes(msgspec.json.encode(config))
    options = ["--admin-address-path", admin, "--disable-hot-restart", "--concurrency", "1"]
    with output.open("wb") as log:
        envoy = await asyncio.create_subprocess_exec(ENVOY, "-c", file, *options, stdout=log, stderr=log)
    try:
        async with httpx2.AsyncClient() as http:

            async def address() -> str | None:
                assert envoy.returncode is None, output.read_text()[-4000:]
                return admin.read_text() if admin.exists() else None

            base = f"http://{await eventually(address)}"

            async def url() -> str | None:
                told = (await http.get(f"{base}/listeners?format=json")).json()
                clusters = (await http.get(f"{base}/clusters?format=json")).json()
                hosts = [
                    host for c in clusters.get("cluster_statuses", []) for host in c.get("host_statuses", [])
                ]
                if not told or len(hosts) < len(config["static_resources"]["clusters"]):
                    return None
                if any(host["health_status"] != {"eds_health_status": "HEALTHY"} for host in hosts):
                    return None
                place = told["listener_statuses"][0]["local_address"]["socket_address"]
                return f"http://{place['address']}:{place['port_value']}"

            found = await eventually(url)
            assert found is not None
        yield found
    finally:
        if envoy.returncode is None:
            envoy.kill()
        await envoy.wait()
