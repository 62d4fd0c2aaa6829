"""What a worker is started with."""

from __future__ import annotations

from bear_grpc.executor.spawner import worker_environment


def test_settings_and_tokens_of_the_server_are_withheld_from_workers():
    server = {
        "PATH": "/bin",
        "LANG": "C",
        "BEAR_HUB_TOKEN": "x",
        "HF_TOKEN": "x",
        "HUGGING_FACE_HUB_TOKEN": "x",
        "OTEL_EXPORTER_OTLP_HEADERS": "x",
    }
    found = worker_environment(server)
    assert found.keys() & server.keys() == {"PATH", "LANG"}
    assert "x" not in found.values()


def test_an_abort_starts_no_debugger_whatever_the_server_was_told():
    assert worker_environment({"GGML_NO_BACKTRACE": "0"})["GGML_NO_BACKTRACE"] == "1"
