"""The blocking client against a real server."""

from __future__ import annotations

import threading

import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

from bear_grpc.client import CallCancelled, Client
from bear_grpc.v1 import inference_service_pb2 as inference
from bear_grpc.v1 import model_service_pb2 as models
from bear_grpc.v1 import server_service_pb2 as server_pb
from tests.client.fake_server import WAIT_S, FakeServer


def test_generate_yields_the_events(server: FakeServer, client: Client) -> None:
    kinds = [event.WhichOneof("event") for event in client.generate("m", "p", request_id="mine")]
    assert kinds == ["started", "delta", "delta", "delta", "completed"]
    assert server.last(inference.GenerateRequest).request_id == "mine"


def test_stream_text_yields_what_is_not_empty(client: Client) -> None:
    assert list(client.stream_text("m", "p")) == ["Hel", "lo"]


def test_generate_once_gives_the_whole_answer(server: FakeServer, client: Client) -> None:
    response = client.generate_once("m", messages=[{"role": "user", "content": "Hi"}])
    assert response.choices[0].text == "Hello"
    assert server.last(inference.GenerateOnceRequest).request.chat.messages[0].role == "user"


def test_breaking_out_of_a_stream_cancels_the_call(server: FakeServer, client: Client) -> None:
    server.endless = True
    for _ in client.stream_text("m", "p"):
        break
    assert server.cancelled.wait(WAIT_S)


def test_leaving_the_context_of_a_stream_cancels_the_call(server: FakeServer, client: Client) -> None:
    server.endless = True
    with client.generate("m", "p") as events:
        next(events)
    assert server.cancelled.wait(WAIT_S)


def test_an_error_in_the_body_cancels_the_call(server: FakeServer, client: Client) -> None:
    server.endless = True
    with pytest.raises(ZeroDivisionError), client.generate("m", "p") as events:
        for _ in events:
            _ = 1 / 0
    assert server.cancelled.wait(WAIT_S)


def test_cancel_from_another_thread_wakes_the_reader(server: FakeServer, client: Client) -> None:
    server.endless = True
    events = client.generate("m", "p")
    next(events)
    canceller = threading.Thread(target=events.cancel)
    canceller.start()
    with pytest.raises(CallCancelled):
        list(events)
    canceller.join()
    assert server.cancelled.wait(WAIT_S)


def test_a_stream_read_to_its_end_stays_ended(client: Client) -> None:
    texts = client.stream_text("m", "p")
    assert list(texts) == ["Hel", "lo"]
    assert list(texts) == []


def test_list_models_goes_through_the_pages(server: FakeServer, client: Client) -> None:
    assert [model.name for model in client.list_models()] == ["bear-demo", "plain"]
    tokens = [r.page_token for r in server.requests if isinstance(r, models.ListModelsRequest)]
    assert tokens == ["", "1"]


def test_list_models_filters_by_state(client: Client) -> None:
    assert [model.name for model in client.list_models(states=["available"])] == ["plain"]


def test_models_live_through_the_client(server: FakeServer, client: Client) -> None:
    assert client.get_model("demo", include_metadata=True).metadata[0].key == "general.name"
    assert client.get_model_status("demo").status.name == "bear-demo"
    assert client.load_model("demo", context_length=512).load_seconds == 0.5
    assert client.unload_model("demo", drain_timeout=0).released_bytes > 0
    assert client.register_model("n", "/p").model.name == "n"
    assert client.delete_model("n").released_bytes == 1 << 20
    assert server.last(models.LoadModelRequest).options.context_length == 512


def test_watch_models_ends_with_the_stream(client: Client) -> None:
    assert len(list(client.watch_models("bear-demo"))) == 2


def test_pull_model_yields_the_events_to_the_end(server: FakeServer, client: Client) -> None:
    kinds = [event.WhichOneof("event") for event in client.pull_model("tiny")]
    assert kinds == ["progress", "started", "progress", "progress", "verifying", "completed"]
    assert server.last(models.PullModelRequest) == models.PullModelRequest(name="tiny")


def test_pull_model_takes_a_file_on_the_hub(server: FakeServer, client: Client) -> None:
    for _ in client.pull_model(repo_id="owner/repo", file="a.gguf", revision="v1"):
        pass
    source = server.last(models.PullModelRequest).source
    assert (source.repo_id, source.file, source.revision) == ("owner/repo", "a.gguf", "v1")


def test_leaving_a_pull_ends_the_call_only(server: FakeServer, client: Client) -> None:
    server.endless = True
    with client.pull_model("tiny") as events:
        next(events)
    assert server.cancelled.wait(WAIT_S)
    assert not any(isinstance(request, models.CancelPullRequest) for request in server.requests)


def test_files_and_memory_of_models(server: FakeServer, client: Client) -> None:
    assert client.cancel_pull("tiny").kept_bytes == 312 << 20
    assert len(client.prune_models(dry_run=True).files) == 2
    assert server.last(models.PruneModelsRequest).dry_run
    assert client.estimate_memory("tiny", context_length=512, gpu_layers=0).fits
    request = server.last(models.EstimateMemoryRequest)
    assert (request.name, request.options.context_length) == ("tiny", 512)
    assert request.options.HasField("gpu_layers")


def test_get_model_asks_for_tensors_only_when_told(server: FakeServer, client: Client) -> None:
    assert not client.get_model("demo").tensors
    assert client.get_model("demo", include_tensors=True).tensors[0].name == "output.weight"
    assert not server.last(models.GetModelRequest).include_metadata


def test_text_calls(client: Client) -> None:
    assert list(client.tokenize("m", "hello").token_ids) == [1, 300]
    assert client.detokenize("m", [1, 300]).text == "hello"
    assert client.count_tokens("m", messages=[{"role": "user", "content": "Hi"}]).token_count == 7


def test_server_info_and_health(client: Client) -> None:
    assert client.server_info().core_count == 2
    assert client.health("models/plain").status == HealthCheckResponse.NOT_SERVING


def test_load_once_and_at_intervals(server: FakeServer, client: Client) -> None:
    assert client.get_load().load.running_count == 2
    assert [answer.load.running_count for answer in client.watch_load(0.25)] == [0, 1]
    assert server.last(server_pb.WatchLoadRequest).interval.ToMilliseconds() == 250
    assert list(client.watch_load())
    assert not server.last(server_pb.WatchLoadRequest).HasField("interval")


def test_a_unix_socket_is_a_target(unix_server: FakeServer) -> None:
    with Client(unix_server.target, timeout=WAIT_S) as client:
        assert client.server_info().version == "0.1.0"
