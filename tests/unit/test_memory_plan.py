"""What a load takes on the host by its header: weights, KV cache, states."""

from __future__ import annotations

import dataclasses
import platform

import pytest

from bear_grpc.errors import InvalidField
from bear_grpc.load_plan import kv_cells
from bear_grpc.models.gguf_types import ArraySummary
from bear_grpc.models.memory import MERGE_BYTES, TOKEN_BYTES, WORKER_BYTES, overhead_bytes
from bear_grpc.protocol import DeviceInfo
from bear_grpc.types import KvCacheType, LoadOptions
from tests.helpers.plans import (
    ALL_WEIGHTS,
    EMBEDDINGS,
    FEED_FORWARD,
    GIB,
    HEADS,
    KV_HEADS,
    LAYERS,
    OPTIONS,
    ROW_VALUES,
    VOCABULARY,
    WIDTH,
    kv_bytes,
    made_header,
    planned,
)

# ---- the host ---------------------------------------------------------------------------------------


def test_plan_without_gpu_is_the_sum_on_the_host():
    found = planned()
    (need,) = found.devices
    assert (need.device, need.weights_bytes, need.free_bytes) == ("CPU", ALL_WEIGHTS, 8 * GIB)
    assert need.kv_cache_bytes == 1024 * LAYERS * ROW_VALUES * 2
    assert need.overhead_bytes == WORKER_BYTES + TOKEN_BYTES * VOCABULARY
    assert (
        need.needed_bytes
        == need.lasting_bytes
        == sum((need.weights_bytes, need.kv_cache_bytes, need.compute_bytes, need.overhead_bytes))
    )
    assert found.options.gpu_layers == 0
    assert found.fits


def test_gpu_layers_asked_for_without_a_gpu_stay_on_the_host():
    found = planned(None, LoadOptions(context_length=512, gpu_layers=2))
    assert found.devices[0].weights_bytes >= ALL_WEIGHTS
    assert len(found.devices) == 1


def test_open_options_are_chosen_as_the_worker_chooses_them():
    chosen = planned(None, LoadOptions()).options
    assert (chosen.context_length, chosen.max_sequences, chosen.kv_cache_tokens) == (2048, 8, 16_384)
    assert chosen.kv_cache_type is KvCacheType.F16


def test_fewer_sequences_are_chosen_where_less_memory_is_free():
    free = 8 * 3 * 2048 * LAYERS * ROW_VALUES * 2
    poor = DeviceInfo("CPU", "", "cpu", free, 16 * GIB)
    assert planned(None, LoadOptions(repack=False), poor).options.max_sequences == 3


def test_context_beyond_the_models_own_is_refused():
    with pytest.raises(InvalidField, match=r"options\.context_length"):
        planned(None, LoadOptions(context_length=4097))


def test_pairs_of_a_tokenizer_count_as_overhead():
    made = made_header()
    made.metadata["tokenizer.ggml.merges"] = ArraySummary("string", 500)
    assert overhead_bytes(made) - overhead_bytes(made_header()) == 500 * MERGE_BYTES


# ---- weights ----------------------------------------------------------------------------------------


@pytest.fixture
def x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.mark.usefixtures("x86")
@pytest.mark.parametrize(
    ("kind", "is_copied"), [("Q4_0", True), ("Q4_K", True), ("Q8_0", False), ("F16", False)]
)
def test_rearranged_weights_are_copies_beside_the_mapped_file(kind: str, is_copied: bool):
    made = made_header(kind=kind)
    need = planned(made, LoadOptions(context_length=512, max_sequences=2)).devices[0]
    copied = (EMBEDDINGS + LAYERS * WIDTH * FEED_FORWARD) * is_copied
    # The last tensor in place is the last layer's norm: the file stays mapped up to there.
    end = ALL_WEIGHTS - (EMBEDDINGS + WIDTH * FEED_FORWARD) * is_copied
    assert need.weights_bytes == end + copied
    assert need.reclaimable_bytes == (LAYERS - 1) * WIDTH * FEED_FORWARD * is_copied


@pytest.mark.usefixtures("x86")
def test_weights_that_are_not_mapped_are_there_once():
    need = planned(made_header(kind="Q4_0"), LoadOptions(context_length=512, mmap=False)).devices[0]
    assert (need.weights_bytes, need.reclaimable_bytes) == (ALL_WEIGHTS, 0)


@pytest.mark.usefixtures("x86")
def test_tied_embeddings_are_copied_for_the_output():
    made = made_header(kind="Q4_0", is_tied=True)
    need = planned(made, LoadOptions(context_length=512, mmap=False)).devices[0]
    assert need.weights_bytes == ALL_WEIGHTS


def test_parts_of_a_split_model_are_mapped_one_by_one():
    made = made_header()
    again = tuple(dataclasses.replace(made.tensors[place], name=f"blk.3.{place}") for place in (0, 1))
    need = planned(dataclasses.replace(made, tensors=made.tensors + again)).devices[0]
    assert need.weights_bytes == ALL_WEIGHTS + sum(tensor.byte_count for tensor in again)


# ---- KV cache and states ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unified", "tokens", "cells"), [(False, 700, 1024), (True, 700, 768), (False, 512, 512)]
)
def test_cells_are_rounded_up_in_every_part(unified: bool, tokens: int, cells: int):
    assert kv_cells(LoadOptions(max_sequences=2, kv_cache_tokens=tokens, kv_unified=unified)) == cells


def test_kv_type_counts_in_blocks():
    eight_bits = LoadOptions(kv_cache_type=KvCacheType.Q8_0).over(OPTIONS)
    header = made_header(attention__key_length=64, attention__value_length=32)
    assert kv_bytes(header, eight_bits) == kv_bytes(header) * 34 // 64


def test_layers_have_their_own_numbers_of_heads():
    rows = kv_bytes(made_header(attention__head_count_kv=(1, 2, 3, 0)))
    assert rows == 1024 * 6 * 2 * (WIDTH // HEADS) * 2


def test_lengths_of_keys_and_values_win_over_the_embeddings_share():
    assert (
        kv_bytes(made_header(attention__key_length=48, attention__value_length=8))
        == 1024 * LAYERS * 2 * 56 * 2
    )


def test_layers_with_a_window_are_kept_in_full():
    assert kv_bytes(made_header("gemma2", attention__sliding_window=16)) == kv_bytes(made_header())


def test_values_read_from_keys_are_not_kept():
    made = made_header(
        "deepseek2", attention__head_count_kv=1, attention__key_length=40, attention__key_length_mla=24
    )
    assert kv_bytes(made) == 1024 * LAYERS * 40 * 2


def test_layers_that_share_a_cache_have_none():
    assert kv_bytes(made_header("gemma3n", attention__shared_kv_layers=3)) == kv_bytes(made_header()) // 4


STATE = 3 * 128 + 8 * 128
SSM = {"ssm__conv_kernel": 4, "ssm__inner_size": 128, "ssm__state_size": 8}


def test_recurrent_model_has_a_state_per_sequence_and_no_cache():
    assert kv_bytes(made_header("mamba", attention__head_count=0, attention__head_count_kv=None, **SSM)) == (
        2 * LAYERS * STATE * 4
    )


def test_hybrid_model_has_either_in_its_layers():
    made = made_header("jamba", attention__head_count_kv=(0, 0, 0, KV_HEADS), **SSM)
    assert kv_bytes(made) == 1024 * ROW_VALUES * 2 + 2 * 3 * STATE * 4
    assert planned(made, LoadOptions(kv_unified=True)).options.kv_unified is False


def test_hybrid_model_attends_in_every_so_many_layers():
    made = made_header("qwen3next", full_attention_interval=4, **SSM)
    assert kv_bytes(made) == 1024 * ROW_VALUES * 2 + 2 * 3 * STATE * 4


def test_short_convolution_keeps_its_last_inputs():
    made = made_header("lfm2", attention__head_count_kv=(0, KV_HEADS, 0, KV_HEADS), shortconv__l_cache=3)
    assert kv_bytes(made) == 1024 * 2 * ROW_VALUES * 2 + 2 * 2 * 2 * WIDTH * 4
