"""nginx on loopback with one model file, as a hub tells of it and gives it out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cache import SetupError

REPO_ID = "bench/model"
COMMIT = "1" * 40
START_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Site:
    """Where it listens, and the file that it has."""

    endpoint: str
    file: str
    sha256: str
    size_bytes: int

    @property
    def url(self) -> str:
        return f"{self.endpoint}/{REPO_ID}/resolve/{COMMIT}/{self.file}"

    @property
    def reference(self) -> str:
        """The model's name for a pull."""
        return f"{REPO_ID}/{self.file}"


@contextlib.contextmanager
def serving(file: Path) -> Iterator[Site]:
    """nginx with this file. Raises SetupError where there is no nginx, or it does not come up."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise SetupError("nginx is not installed: install it by the system's package manager")
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    site = Site(f"http://127.0.0.1:{port}", file.name, sha256, file.stat().st_size)
    with tempfile.TemporaryDirectory(prefix="nginx-") as folder:
        root = Path(folder)
        os.chmod(root, 0o755)  # its workers may run as another user
        (root / "listing.json").write_text(json.dumps(_listing(site)))
        (root / "nginx.conf").write_text(_configuration(root, file, port, site))
        process = subprocess.Popen(
            [program, "-p", folder, "-c", str(root / "nginx.conf")], stdin=subprocess.DEVNULL
        )
        try:
            _wait(process, port)
            yield site
        finally:
            process.terminate()
            process.wait()


def _listing(site: Site) -> dict[str, object]:
    """What the hub's API says of the repository."""
    lfs = {"sha256": site.sha256, "size": site.size_bytes, "pointerSize": 134}
    sibling = {"rfilename": site.file, "size": site.size_bytes, "blobId": "2" * 40, "lfs": lfs}
    return {"id": REPO_ID, "modelId": REPO_ID, "sha": COMMIT, "siblings": [sibling], "tags": []}


def _configuration(root: Path, file: Path, port: int, site: Site) -> str:
    user = "user root;" if os.geteuid() == 0 else ""
    temporary = "\n".join(
        f"  {kind}_temp_path {root}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""{user}
daemon off;
pid {root}/pid;
error_log {root}/error.log;
worker_processes 1;
events {{}}
http {{
{temporary}
  access_log off;
  sendfile on;
  server {{
    listen 127.0.0.1:{port};
    root {root};
    location /api/models/{REPO_ID}/ {{ default_type application/json; try_files /listing.json =404; }}
    location = /{REPO_ID}/resolve/{COMMIT}/{site.file} {{
      alias {file};
      add_header X-Repo-Commit {COMMIT};
      add_header X-Linked-Etag '"{site.sha256}"';
      add_header X-Linked-Size {site.size_bytes};
    }}
  }}
}}
"""


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.01)
    raise SetupError("nginx does not come up")
