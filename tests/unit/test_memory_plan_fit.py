"""Layers on GPUs, the numbers of a dry run, whether all fits, and headers that are not honest."""

from __future__ import annotations

import platform

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bear_grpc.errors import InvalidField, ModelFileInvalid
from bear_grpc.models.gguf_types import MetadataValue
from bear_grpc.models.memory import GPU_CONTEXT_BYTES, DeviceNeed
from bear_grpc.models.sizes import ModelSizes
from bear_grpc.protocol import DeviceInfo, DeviceUse, DryRun
from bear_grpc.types import LoadOptions
from tests.helpers.plans import (
    ALL_WEIGHTS,
    EMBEDDINGS,
    GIB,
    HOST,
    LAYER_WEIGHTS,
    LAYERS,
    OPTIONS,
    gpu,
    kv_bytes,
    made_header,
    planned,
)


@pytest.fixture
def x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


# ---- GPUs -------------------------------------------------------------------------------------------


def test_all_layers_go_to_a_gpu_that_has_room():
    found = planned(None, OPTIONS, HOST, gpu(4 * GIB))
    host, card = found.devices
    assert found.options.gpu_layers == -1
    assert (host.weights_bytes, card.weights_bytes) == (EMBEDDINGS, ALL_WEIGHTS - EMBEDDINGS)
    assert (host.kv_cache_bytes, card.kv_cache_bytes) == (0, kv_bytes(made_header()))
    assert card.overhead_bytes == GPU_CONTEXT_BYTES


def test_as_many_layers_as_fit_go_to_a_small_gpu():
    both = planned(None, LoadOptions(gpu_layers=2).over(OPTIONS), HOST, gpu(GIB))
    need = both.devices[1].needed_bytes
    enough, short = gpu(int(need / 0.95) + 1), gpu(int(need / 0.95) - 1000)
    assert planned(None, OPTIONS, HOST, enough).options.gpu_layers == 2
    assert planned(None, OPTIONS, HOST, short).options.gpu_layers == 1
    assert planned(None, OPTIONS, HOST, gpu(1000)).options.gpu_layers == 0


def test_gpu_layers_asked_for_are_taken_though_they_do_not_fit():
    found = planned(None, LoadOptions(context_length=512, gpu_layers=3, repack=False), HOST, gpu(1000))
    assert (found.options.gpu_layers, found.fits) == (3, False)
    assert found.devices[1].weights_bytes == 2 * LAYER_WEIGHTS + EMBEDDINGS


def test_tied_embeddings_are_twice_where_the_output_is_on_a_gpu():
    host, card = planned(made_header(is_tied=True), OPTIONS, HOST, gpu(4 * GIB)).devices
    assert (host.weights_bytes, card.weights_bytes) == (EMBEDDINGS, LAYERS * LAYER_WEIGHTS + EMBEDDINGS)


def test_layers_are_spread_by_what_is_free():
    cards = gpu(3 * GIB), gpu(2 * GIB, "CUDA1")
    _, first, second = planned(None, OPTIONS, HOST, *cards).devices
    assert first.weights_bytes == 3 * LAYER_WEIGHTS
    assert second.weights_bytes == LAYER_WEIGHTS + EMBEDDINGS


def test_gpu_in_the_host_is_used_only_without_another():
    shared = DeviceInfo("Vulkan0", "", "igpu", 4 * GIB, 4 * GIB)
    assert [need.device for need in planned(None, OPTIONS, HOST, shared).devices] == ["CPU", "Vulkan0"]
    assert [need.device for need in planned(None, OPTIONS, HOST, shared, gpu(GIB)).devices] == [
        "CPU",
        "CUDA0",
    ]


# ---- a dry run --------------------------------------------------------------------------------------

EFFECTIVE = LoadOptions(context_length=256, max_sequences=3, kv_cache_tokens=768, gpu_layers=0)


def test_numbers_and_options_of_a_dry_run_win():
    dry_run = DryRun(EFFECTIVE, [DeviceUse("CPU", 12_345, 678)], ["CPU"] * (LAYERS + 1))
    found = planned(dry_run=dry_run)
    assert found.options == EFFECTIVE
    assert (found.devices[0].kv_cache_bytes, found.devices[0].compute_bytes) == (12_345, 678)


def test_layers_are_where_the_dry_run_has_put_them():
    places = ["CPU", "CPU", "CUDA0", "CUDA0", "CUDA0"]
    dry_run = DryRun(LoadOptions(gpu_layers=3).over(EFFECTIVE), [DeviceUse("CUDA0", 7, 8)], places)
    host, card = planned(None, OPTIONS, HOST, gpu(GIB), dry_run=dry_run).devices
    assert card.weights_bytes == 2 * LAYER_WEIGHTS + EMBEDDINGS
    assert (card.kv_cache_bytes, card.compute_bytes, host.kv_cache_bytes) == (7, 8, 0)


@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize(("moved", "copied"), [(5, True), (10, False), (None, False)])
def test_rearranged_types_are_found_by_the_number_of_moved_tensors(moved: int | None, copied: bool):
    """A CPU that takes Q8_0, which the others of its kind do not; 10 tensors, 5 of them can be copied."""
    made = made_header(kind="Q8_0")
    dry_run = DryRun(EFFECTIVE, [], ["CPU"] * (LAYERS + 1), moved)
    need = planned(made, LoadOptions(mmap=True), dry_run=dry_run).devices[0]
    assert (need.reclaimable_bytes > 0) == copied


# ---- whether it fits --------------------------------------------------------------------------------


def need(device: str, weights: int, free: int, reclaimable: int = 0) -> DeviceNeed:
    return DeviceNeed(device, weights, 0, 0, 0, free, reclaimable)


def test_pages_that_can_be_taken_back_need_not_fit():
    assert need("CPU", 100, 60, reclaimable=40).lasting_bytes == 60
    assert planned(None, OPTIONS, DeviceInfo("CPU", "", "cpu", 10**6, 10**6)).fits is False


# ---- headers that are not honest --------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["block_count", "embedding_length", "context_length", "attention__head_count"]
)
def test_header_without_what_every_model_says_is_refused(key: str):
    with pytest.raises(ModelFileInvalid):
        planned(made_header(**{key: None}))


def test_header_with_too_many_layers_is_refused():
    with pytest.raises(ModelFileInvalid, match="layers"):
        planned(made_header(block_count=2**31 - 1))


VALUES = st.one_of(
    st.sampled_from([0, 1, 3, 64, 2**16, 2**31 - 1, -1, 2**63]),
    st.lists(st.integers(0, 2**31), max_size=LAYERS + 1).map(tuple),
    st.text(max_size=3),
    st.booleans(),
    st.floats(),
)
KEYS = (
    "block_count", "embedding_length", "context_length", "feed_forward_length", "attention__head_count",
    "attention__head_count_kv", "attention__key_length", "attention__shared_kv_layers", "expert_count",
    "expert_used_count", "full_attention_interval", "ssm__inner_size", "wkv__head_size", "kda__head_dim",
)  # fmt: skip


@settings(max_examples=500, derandomize=True, deadline=None, database=None)
@given(
    st.sampled_from(["llama", "mamba", "jamba", "qwen3next", "rwkv6", "lfm2", "kimi-linear"]),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6),
)
def test_any_header_is_planned_or_refused(architecture: str, changes: dict[str, MetadataValue]):
    try:
        found = planned(made_header(architecture, **changes), LoadOptions(), HOST, gpu(GIB))
    except (ModelFileInvalid, InvalidField):
        return
    assert all(device.needed_bytes >= 0 for device in found.devices)
    assert ModelSizes(made_header(architecture, **changes)).layers > 0
