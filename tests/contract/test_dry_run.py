"""A load without weights tells what the real load comes to, and takes next to nothing itself."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bear_grpc.errors import InvalidField, ModelFileInvalid, ModelFileNotFound
from bear_grpc.executor.probe import probe
from bear_grpc.executor.spawner import Spawner
from bear_grpc.models.gguf import read_header
from bear_grpc.models.sizes import ModelSizes
from bear_grpc.types import KvCacheType, LoadOptions
from tests.helpers.architectures import ARCHITECTURES, write_architecture
from tests.helpers.ggufs import corrupt, write_tiny_llama

pytestmark = pytest.mark.model

MIB = 2**20
LOGGED_BYTES = MIB // 100
"""What llama.cpp's log rounds sizes to."""

GIVEN = {
    "open": LoadOptions(),
    "small": LoadOptions(context_length=256, max_sequences=3),
    "unified": LoadOptions(context_length=512, max_sequences=2, kv_unified=True),
    "q8_0": LoadOptions(context_length=512, max_sequences=2, kv_cache_type=KvCacheType.Q8_0),
}
MODELS = ["tiny", *ARCHITECTURES]


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    from bear_grpc.backend import native

    native.start()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: write_architecture(folder / f"{name}.gguf", name) for name in ARCHITECTURES}
    # Wide enough for blocks of 32 in each head.
    made["tiny"] = write_tiny_llama(folder / "tiny.gguf", n_embd=128, n_layer=2, context_length=1024)
    return made


@pytest.mark.parametrize("given", ["open", "small", "unified"])
@pytest.mark.parametrize("name", MODELS)
def test_options_and_context_are_those_of_the_load(models: dict[str, Path], name: str, given: str):
    from bear_grpc.backend import dry, llama

    options = GIVEN[given]
    dry_run = dry.dry_run(models[name], options, cores=2)
    backend = llama.LlamaBackend(models[name], options, cores=2, report=lambda stage, fraction: None)
    try:
        assert dry_run.options == backend.options
        loaded_kv_bytes, loaded_compute_bytes = backend.kv_cache_bytes, backend.compute_bytes
    finally:
        backend.close()
    sizes = ModelSizes(read_header(models[name]))
    assert dry_run.layer_devices == ["CPU"] * (sizes.layers + 1)
    (use,) = dry_run.devices
    # Rounded for each of up to three caches: with a window, without, and states.
    assert use.kv_cache_bytes == pytest.approx(sum(sizes.kv_bytes(dry_run.options)), abs=3 * LOGGED_BYTES)
    assert use.compute_bytes > 0
    assert loaded_kv_bytes == pytest.approx(use.kv_cache_bytes, abs=3 * LOGGED_BYTES)
    assert loaded_compute_bytes == pytest.approx(use.compute_bytes, abs=3 * LOGGED_BYTES)


def test_kv_cache_of_another_type_is_told(models: dict[str, Path]):
    from bear_grpc.backend import dry

    half, eight = (
        dry.dry_run(models["tiny"], options, cores=1).devices[0].kv_cache_bytes
        for options in (LoadOptions(context_length=256, max_sequences=8), GIVEN["q8_0"])
    )
    assert half == 8 * 256 * 2 * 2 * 128 * 2
    assert eight == pytest.approx(2 * 512 * 2 * 2 * 128 * 34 / 32, abs=LOGGED_BYTES)


@pytest.mark.parametrize("name", ["mamba", "jamba", "lfm2"])
def test_states_that_are_not_all_made_are_counted_for_all(
    models: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
):
    from bear_grpc.backend import dry

    options = LoadOptions(context_length=256, max_sequences=5)
    whole = dry.dry_run(models[name], options, cores=1).devices[0].kv_cache_bytes
    made: list[int] = []
    real = dry._make_context

    def watch(model: object, effective: LoadOptions, sequences: int) -> None:
        made.append(sequences)
        real(model, effective, sequences)

    monkeypatch.setattr(dry, "_make_context", watch)
    monkeypatch.setattr(dry, "STATE_LIMIT_BYTES", 1)
    few = dry.dry_run(models[name], options, cores=1).devices[0].kv_cache_bytes
    assert made == [1, 1]
    assert few == pytest.approx(whole, abs=2 * 5 * LOGGED_BYTES)


def test_log_is_not_collected_after_a_dry_run(models: dict[str, Path]):
    from bear_grpc.backend import dry, native

    dry.dry_run(models["tiny"], LoadOptions(), cores=1)
    assert native.native_log.lines is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_neither_weights_nor_kv_cache_are_allocated(models: dict[str, Path]):
    from bear_grpc.backend import dry

    options = LoadOptions(context_length=256, max_sequences=2, kv_cache_tokens=2**20, kv_unified=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    dry_run = dry.dry_run(models["tiny"], options, cores=1)
    assert dry_run.devices[0].kv_cache_bytes == 2**20 * 2 * 2 * 128 * 2
    # What llama.cpp keeps of each cell is there, 48 bytes.
    assert peak_bytes() - before < 128 * MIB


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


# ---- by a probe worker ------------------------------------------------------------------------------


@pytest.fixture
def spawner() -> Iterator[Spawner]:
    made = Spawner()
    yield made
    made.close()
    made.join()


def test_probe_tells_devices_model_and_dry_run(models: dict[str, Path], spawner: Spawner):
    from bear_grpc.backend import dry

    found = asyncio.run(probe(spawner, models["tiny"], GIVEN["small"], 3))
    assert found.info is not None
    assert found.info.architecture == "llama"
    assert found.dry_run == dry.dry_run(models["tiny"], GIVEN["small"], cores=3)
    host = next(device for device in found.devices if device.kind == "cpu")
    assert 0 < host.free_bytes < host.total_bytes


def test_probe_without_options_makes_no_dry_run(models: dict[str, Path], spawner: Spawner):
    found = asyncio.run(probe(spawner, models["tiny"]))
    assert found.info is not None
    assert found.dry_run is None


def test_probe_raises_what_the_load_would_raise(models: dict[str, Path], spawner: Spawner, tmp_path: Path):
    spoiled = tmp_path / "spoiled.gguf"
    spoiled.write_bytes(models["tiny"].read_bytes())
    corrupt(spoiled, "unknown architecture")
    with pytest.raises(ModelFileInvalid):
        asyncio.run(probe(spawner, spoiled, LoadOptions()))
    with pytest.raises(ModelFileNotFound):
        asyncio.run(probe(spawner, tmp_path / "missing.gguf", LoadOptions()))
    with pytest.raises(InvalidField, match=r"options\.context_length"):
        asyncio.run(probe(spawner, models["tiny"], LoadOptions(context_length=2**20)))
