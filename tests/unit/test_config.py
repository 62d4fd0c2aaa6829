"""Settings: where they come from, in which order, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bear_grpc.config import ConfigError, ModelConfig, ServerConfig, available_cores, load_config
from bear_grpc.params import GenerationDefaults
from bear_grpc.transport import is_local
from bear_grpc.types import LoadOptions


def write(folder: Path, text: str) -> Path:
    file = folder / "bear.toml"
    file.write_text(text)
    return file


def load(
    file: Path | None = None, flags: dict[str, object] | None = None, environ: dict[str, str] | None = None
) -> ServerConfig:
    return load_config(file, flags, environ or {})


def test_config_of_nothing_has_the_defaults():
    made = load()
    assert (made.listen, made.load, made.log_level) == (["127.0.0.1:50051"], [], "INFO")
    assert made.models_dir.is_absolute()


def test_config_merges_defaults_file_environment_and_flags_in_this_order(tmp_path):
    file = write(tmp_path, 'log_level = "DEBUG"\nstop_grace_s = 1.0\nstall_timeout_s = 1.0\n')
    environ = {"BEAR_STOP_GRACE_S": "2", "BEAR_STALL_TIMEOUT_S": "2"}
    made = load(file, {"stall_timeout_s": 3.0}, environ)
    assert made.max_waiting_requests == ServerConfig().max_waiting_requests
    assert (made.log_level, made.stop_grace_s, made.stall_timeout_s) == ("DEBUG", 2.0, 3.0)


@pytest.mark.parametrize("missing", [None, [], ()])
def test_config_flags_not_given_leave_the_rest_alone(missing, tmp_path):
    made = load(write(tmp_path, 'listen = ["unix:/a"]'), {"listen": missing})
    assert made.listen == ["unix:/a"]


def test_config_flag_set_to_false_counts_as_given(tmp_path):
    assert load(write(tmp_path, "reflection = true"), {"reflection": False}).reflection is False


def test_config_environment_lists_are_comma_separated():
    made = load(environ={"BEAR_LISTEN": "127.0.0.1:1,unix:/a", "BEAR_ALLOW_PATH": "/m,/n"})
    assert made.listen == ["127.0.0.1:1", "unix:/a"]
    assert made.allow_path == [Path("/m"), Path("/n")]


@pytest.mark.parametrize("name", ["BEAR_SERVER", "BEAR_API_KEY", "BEAR_PORT", "BEAR_MODELS", "LISTEN"])
def test_config_environment_of_others_is_left_alone(name):
    assert load(environ={name: "x"}) == load()


def test_config_prefixes_are_shared_inside_a_tenant_unless_set_otherwise():
    assert (load().prefix_sharing, load().step_target_ms) == ("tenant", 0.0)
    made = load(environ={"BEAR_PREFIX_SHARING": "off", "BEAR_STEP_TARGET_MS": "80"})
    assert (made.prefix_sharing, made.step_target_ms) == ("off", 80.0)


def test_config_paths_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/bear")
    assert load(flags={"models_dir": "~/models"}).models_dir == Path("/home/bear/models")


def test_config_models_of_a_file_have_options_and_defaults(tmp_path):
    text = "[models.bear-demo.load_options]\nthreads = 2\n[models.bear-demo.defaults]\ntemperature = 0.0\n"
    made = load(write(tmp_path, text))
    assert made.models == {
        "bear-demo": ModelConfig(GenerationDefaults(temperature=0.0), LoadOptions(threads=2))
    }


def test_config_unknown_setting_of_a_file_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="'log_levl'; did you mean 'log_level'"):
        load(write(tmp_path, 'log_levl = "INFO"'))


def test_config_unknown_setting_like_no_other_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'zzz'$"):
        load(write(tmp_path, "zzz = 1"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("listen = []", "listen"),
        ("max_waiting_requests = 0", "max_waiting_requests"),
        ("max_waiting_tokens = 0", "max_waiting_tokens"),
        ('max_waiting_requests = "many"', "max_waiting_requests"),
        ("stall_timeout_s = 0.0", "stall_timeout_s"),
        ("stall_timeout_s = nan", "stall_timeout_s"),
        ("stop_grace_s = -1.0", "stop_grace_s"),
        ('prefix_sharing = "some"', "prefix_sharing"),
        ("step_target_ms = -1.0", "step_target_ms"),
        ("step_target_ms = nan", "step_target_ms"),
        ("stop_grace_s = nan", "stop_grace_s"),
        ("withdrawal_s = -1.0", "withdrawal_s"),
        ("withdrawal_s = nan", "withdrawal_s"),
        ("keepalive_time_s = 0.0", "keepalive_time_s"),
        ("keepalive_timeout_s = inf", "keepalive_timeout_s"),
        ('log_level = "LOUD"', "log_level"),
        ('otlp_endpoint = "127.0.0.1:4317"', "otlp_endpoint"),
        ("trace_sample_ratio = 1.1", "trace_sample_ratio"),
        ("trace_sample_ratio = nan", "trace_sample_ratio"),
        ("[models.a.load_options]\nthreads = 0", r"models\.a\.load_options\.threads"),
        ("[models.a.load_options]\nthread = 1", "thread"),
        ("[models.a]\noptions = 1", "options"),
        ("[models.a.defaults]\ntemperature = 1000.0", r"models\.a\.defaults\.temperature"),
        ("[models.a.defaults]\nmax_tokens = 0", r"models\.a\.defaults\.max_tokens"),
    ],
)
def test_config_bad_value_is_refused_by_name(text, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        load(write(tmp_path, text))


def test_config_bad_value_of_the_environment_is_refused_by_name():
    with pytest.raises(ConfigError, match="max_waiting_requests"):
        load(environ={"BEAR_MAX_WAITING_REQUESTS": "many"})


def test_config_file_that_is_no_toml_is_refused_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match=r"bear\.toml"):
        load(write(tmp_path, "listen ="))


def test_config_file_that_is_missing_is_refused_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.toml: No such file"):
        load(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:50051", True),
        ("127.8.8.8:1", True),
        ("[::1]:50051", True),
        ("localhost:50051", True),
        ("unix:/tmp/bear.sock", True),
        ("unix-abstract:bear", True),
        ("0.0.0.0:50051", False),
        ("[::]:50051", False),
        ("10.0.0.1:50051", False),
        ("bear.example:50051", False),
        ("localhost.example:50051", False),
        (":50051", False),
    ],
)
def test_is_local_holds_for_addresses_of_this_machine_only(address, local):
    assert is_local(address) is local


@pytest.mark.parametrize(
    ("reflection", "listen", "served"),
    [
        (None, ["127.0.0.1:1", "unix:/a"], True),
        (None, ["127.0.0.1:1", "0.0.0.0:1"], False),
        (True, ["0.0.0.0:1"], True),
        (False, ["127.0.0.1:1"], False),
    ],
)
def test_reflection_unset_is_served_to_this_machine_only(reflection, listen, served):
    assert ServerConfig(listen=listen, reflection=reflection, insecure_public=True).with_reflection is served


@pytest.mark.parametrize(
    ("withdrawal_s", "listen", "pause_s"),
    [
        (None, ["127.0.0.1:1", "unix:/a"], 0.0),
        (None, ["127.0.0.1:1", "0.0.0.0:1"], 2.0),
        (5.0, ["127.0.0.1:1"], 5.0),
        (0.0, ["0.0.0.0:1"], 0.0),
    ],
)
def test_a_withdrawal_unset_has_a_pause_where_others_connect(withdrawal_s, listen, pause_s):
    assert ServerConfig(listen=listen, withdrawal_s=withdrawal_s, insecure_public=True).pause_s == pause_s


def test_available_cores_are_at_least_1_and_at_most_all():
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("name", "value"), [("hub_token", "two words"), ("hub_token", "new\nline"), ("hub_endpoint", "ftp://hub")]
)
def test_hub_setting_that_no_request_can_carry_is_refused_without_its_value(name, value):
    with pytest.raises(ConfigError, match=name) as caught:
        load_config(flags={name: value}, environ={})
    assert name == "hub_endpoint" or value not in str(caught.value)


def test_token_is_not_shown_with_the_settings():
    assert "hf_secret" not in repr(load_config(flags={"hub_token": "hf_secret"}, environ={}))
