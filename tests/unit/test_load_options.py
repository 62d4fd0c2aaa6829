"""Options that nobody asked for: chosen from the model and the machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc import load_plan
from bear_grpc.errors import InvalidField
from bear_grpc.host import UNKNOWN_FREE_BYTES, free_bytes
from bear_grpc.load_plan import PROMPT_OUTPUTS, Situation, choose, sequence_ids
from bear_grpc.types import MAX_SEQUENCES, KvCacheType, LoadOptions

KV_BYTES = {kind: 1000.0 for kind in KvCacheType}
MUCH = 2**40


def situation(**changes: object) -> Situation:
    values = {
        "context_length_train": 4096,
        "cores": 2,
        "gpu_layers": 0,
        "free_bytes": MUCH,
        "kv_token_bytes": KV_BYTES,
        "can_share_ids": True,
    }
    return Situation(**{**values, **changes})


def chosen(here: Situation | None = None, **asked: object) -> LoadOptions:
    return choose(LoadOptions(**asked), here or situation())


# ---- the context ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "context"), [(4096, 2048), (512, 512), (2048, 2048)])
def test_context_is_the_default_or_the_models_own(train, context):
    assert chosen(situation(context_length_train=train)).context_length == context


def test_context_asked_for_up_to_the_models_own_is_taken():
    assert chosen(context_length=4096).context_length == 4096


def test_context_beyond_the_models_own_is_refused_with_its_limit():
    with pytest.raises(InvalidField, match=r"options\.context_length: must be 1 to 4096"):
        chosen(context_length=4097)


def test_context_shrinks_to_a_smaller_pool_only_if_nobody_asked_for_it():
    assert chosen(kv_cache_tokens=1000).context_length == 1000
    with pytest.raises(InvalidField, match=r"options\.kv_cache_tokens: must be at least context_length 1001"):
        chosen(kv_cache_tokens=1000, context_length=1001)


# ---- how many, and the pool -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "gpu_layers", "sequences"),
    [(1, 0, 4), (2, 0, 8), (4, 0, 16), (64, 0, 16), (2, 1, 16), (1, 99, 16)],
)
def test_sequences_are_a_few_for_each_core_or_all_with_a_gpu(cores, gpu_layers, sequences):
    assert chosen(situation(cores=cores, gpu_layers=gpu_layers)).max_sequences == sequences


@pytest.mark.parametrize(("contexts", "sequences"), [(0, 1), (1, 1), (3, 3), (8, 8), (9, 8)])
def test_sequences_fit_into_their_part_of_the_free_memory(contexts, sequences):
    free = int(contexts * 2048 * 1000 / load_plan.KV_SHARE_OF_MEMORY)
    assert chosen(situation(free_bytes=free)).max_sequences == sequences


def test_sequences_count_by_the_kv_type_that_is_used():
    here = situation(
        free_bytes=int(4 * 2048 * 1000 / load_plan.KV_SHARE_OF_MEMORY),
        kv_token_bytes={**KV_BYTES, KvCacheType.Q8_0: 500.0},
    )
    assert chosen(here).max_sequences == 4
    assert chosen(here, kv_cache_type=KvCacheType.Q8_0).max_sequences == 8


def test_sequences_of_a_model_without_kv_are_not_limited_by_memory():
    assert chosen(situation(kv_token_bytes={kind: 0.0 for kind in KvCacheType})).max_sequences == 8


@pytest.mark.parametrize("kind", [KvCacheType.Q8_0, KvCacheType.Q4_0])
def test_quantized_cache_needs_whole_blocks_and_flash_attention(kind):
    assert chosen(situation(head_widths=(64, 32)), kv_cache_type=kind).kv_cache_type is kind
    with pytest.raises(InvalidField, match=r"options\.kv_cache_type.* 32 values, the model's have 80"):
        chosen(situation(head_widths=(64, 80)), kv_cache_type=kind)
    with pytest.raises(InvalidField, match=r"options\.kv_cache_type.* needs flash_attention"):
        chosen(situation(head_widths=(64, 64)), kv_cache_type=kind, flash_attention=False)
    assert chosen(situation(head_widths=(64, 80)), flash_attention=False).kv_cache_type is KvCacheType.F16


def test_pool_is_a_context_for_each_sequence_or_what_is_asked():
    assert chosen(max_sequences=3).kv_cache_tokens == 3 * 2048
    assert chosen(max_sequences=3, kv_cache_tokens=2048).kv_cache_tokens == 2048


@pytest.mark.parametrize(
    ("asked", "can_share_ids", "unified"),
    [
        (None, True, False),
        (False, True, False),
        (True, True, True),
        (None, False, False),
        (True, False, False),
    ],
)
def test_pool_is_unified_where_the_model_can_and_somebody_asks_for_it(asked, can_share_ids, unified):
    assert chosen(situation(can_share_ids=can_share_ids), kv_unified=asked).kv_unified is unified


@pytest.mark.parametrize(("tokens", "unified"), [(6144, False), (6143, True), (2048, True)])
def test_pool_too_small_for_a_part_each_is_shared_as_a_whole(tokens, unified):
    assert chosen(max_sequences=3, kv_cache_tokens=tokens).kv_unified is unified


@pytest.mark.parametrize("changes", [{"kv_unified": False}, {}])
def test_pool_that_is_not_unified_must_have_a_context_for_each_sequence(changes):
    here = situation(can_share_ids=bool(changes))
    assert chosen(here, max_sequences=2, kv_cache_tokens=4096, **changes).kv_cache_tokens == 4096
    with pytest.raises(InvalidField, match=r"options\.kv_cache_tokens: must be 4096 or more.*is 4095"):
        chosen(here, max_sequences=2, kv_cache_tokens=4095, **changes)


# ---- ids, batches and the rest ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "unified", "ids"),
    [(1, True, 32), (8, True, 32), (16, True, 64), (256, True, 256), (3, False, 3)],
)
def test_sequence_ids_leave_places_for_prefixes_in_a_unified_pool(sequences, unified, ids):
    assert sequence_ids(sequences, unified) == ids


def test_batch_always_has_room_for_a_token_of_every_id():
    assert chosen(batch_tokens=32).batch_tokens == 8 + PROMPT_OUTPUTS
    assert chosen(batch_tokens=32, kv_unified=True).batch_tokens == 32 + PROMPT_OUTPUTS
    assert chosen(batch_tokens=100).batch_tokens == 100
    assert chosen(max_sequences=MAX_SEQUENCES, batch_tokens=32).batch_tokens == MAX_SEQUENCES + PROMPT_OUTPUTS


def test_micro_batch_is_never_larger_than_the_batch():
    assert chosen(batch_tokens=128).micro_batch_tokens == 128
    assert chosen(batch_tokens=128, micro_batch_tokens=64).micro_batch_tokens == 64
    assert chosen(batch_tokens=2048).micro_batch_tokens == 512


def test_switches_left_open_are_mmap_and_repack_on_and_mlock_off():
    made = chosen()
    assert (made.mmap, made.mlock, made.repack, made.flash_attention) == (True, False, True, None)
    assert made.kv_cache_type is KvCacheType.F16
    assert made.threads == 2


@pytest.mark.parametrize(
    "asked",
    [
        {"mmap": False},
        {"mlock": True},
        {"repack": False},
        {"flash_attention": False},
        {"threads": 7},
        {"kv_cache_type": KvCacheType.Q4_0},
        {"max_sequences": 5},
        {"context_length": 100},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_is_asked_for_is_what_is_chosen(asked):
    [(name, value)] = asked.items()
    assert getattr(chosen(**asked), name) == value


@given(
    train=st.integers(1, 8192),
    cores=st.integers(1, 64),
    gpu=st.sampled_from([0, 33]),
    free=st.integers(0, 2**36),
    can_share=st.booleans(),
    asked=st.builds(
        LoadOptions,
        context_length=st.none() | st.integers(1, 8192),
        max_sequences=st.none() | st.integers(1, MAX_SEQUENCES),
        kv_cache_tokens=st.none() | st.integers(1, 2**16),
        batch_tokens=st.none() | st.integers(32, 8192),
        micro_batch_tokens=st.none() | st.integers(32, 8192),
        kv_unified=st.none() | st.booleans(),
    ),
)
def test_choice_is_one_that_llama_cpp_takes(train, cores, gpu, free, can_share, asked):
    here = situation(
        context_length_train=train, cores=cores, gpu_layers=gpu, free_bytes=free, can_share_ids=can_share
    )
    try:
        made = choose(asked, here)
    except InvalidField:
        assert asked.context_length or asked.kv_cache_tokens
        return
    ids = sequence_ids(made.max_sequences, made.kv_unified)
    assert made.max_sequences <= ids <= MAX_SEQUENCES
    assert made.batch_tokens >= ids + PROMPT_OUTPUTS
    assert made.micro_batch_tokens <= made.batch_tokens
    assert made.context_length <= min(train, made.kv_cache_tokens)
    assert made.kv_unified or made.kv_cache_tokens >= made.context_length * made.max_sequences
    # What is chosen can be asked for, and gives the same.
    assert choose(made, here) == made


# ---- free memory ------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path):
    """Writes the files that a system tells its memory in."""

    def write(available_kib: int | None = None, limit: str | None = None, used: int | None = None):
        meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
        cgroup.mkdir()
        if available_kib is not None:
            meminfo.write_text(f"MemTotal: 99999 kB\nMemFree: 1 kB\nMemAvailable: {available_kib} kB\n")
        if limit is not None:
            (cgroup / "memory.max").write_text(f"{limit}\n")
        if used is not None:
            (cgroup / "memory.current").write_text(f"{used}\n")
        return free_bytes(meminfo, cgroup)

    return write


def test_free_bytes_are_what_is_available(machine):
    assert machine(available_kib=2000) == 2000 * 1024


@pytest.mark.parametrize(
    ("limit", "free"), [("max", 2000 * 1024), ("1000000", 900_000), ("9000000", 2000 * 1024)]
)
def test_free_bytes_are_within_the_control_groups_limit(machine, limit, free):
    assert machine(available_kib=2000, limit=limit, used=100_000) == free


def test_free_bytes_of_a_group_beyond_its_limit_are_0(machine):
    assert machine(available_kib=2000, limit="1000", used=2000) == 0


def test_free_bytes_of_a_group_alone_are_what_is_left_of_it(machine):
    assert machine(limit="5000", used=2000) == 3000


@pytest.mark.parametrize("files", [{}, {"limit": "1000"}, {"limit": "nonsense", "used": 5}])
def test_free_bytes_that_nothing_tells_are_a_careful_guess(machine, files):
    assert machine(**files) == UNKNOWN_FREE_BYTES


def test_free_bytes_of_this_machine_are_told():
    assert free_bytes() > 0
