"""The server that users test with: it serves for as long as the block, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest

from bear_grpc.testing import serve_in_process
from bear_grpc.v1 import inference_service_pb2 as inference_pb
from bear_grpc.v1 import inference_service_pb2_grpc as inference_grpc
from bear_grpc.v1 import model_service_pb2 as model_pb
from bear_grpc.v1 import model_service_pb2_grpc as model_grpc


def folder_of(target: str) -> Path:
    return Path(target.removeprefix("unix:")).parent


async def test_serve_in_process_answers_and_leaves_no_folder():
    async with serve_in_process() as target, grpc.aio.insecure_channel(target) as channel:
        assert folder_of(target).is_dir()
        answer = await model_grpc.ModelServiceStub(channel).ListModels(model_pb.ListModelsRequest())
    assert "bear-demo" in [model.name for model in answer.models]
    assert not folder_of(target).exists()


async def test_serve_in_process_two_at_once_do_not_meet():
    async with serve_in_process() as first, serve_in_process() as second:
        assert first != second


async def test_serve_in_process_takes_settings_of_the_server(tmp_path):
    from bear_grpc.config import ConfigError

    with pytest.raises(ConfigError, match="listen"):
        async with serve_in_process(listen=[]):
            raise AssertionError("it serves without an address")


@pytest.mark.model
async def test_serve_in_process_generates_with_a_loaded_model():
    async with serve_in_process(load=["bear-demo"]) as target, grpc.aio.insecure_channel(target) as channel:
        request = inference_pb.GenerateRequest(
            model="bear-demo", prompt="The bear", stop=inference_pb.StopParams(max_tokens=4)
        )
        once = inference_pb.GenerateOnceRequest(request=request)
        answer = await inference_grpc.InferenceServiceStub(channel).GenerateOnce(once)
    assert 1 <= answer.usage.completion_token_count <= 4
