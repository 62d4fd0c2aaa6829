"""Every value is checked where it was told: with its full name, its line, its variable or its flag."""

from __future__ import annotations

import enum
import logging
from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc.config import ConfigError, Settings, find_file, load_config, read_settings
from bear_grpc.config.check import convert
from bear_grpc.config.effective import to_json, to_toml, toml_value
from bear_grpc.config.fields import all_settings, reloading, settings_of
from bear_grpc.config.lines import lines_of, nearest_line
from bear_grpc.config.settings import about


def write(folder: Path, text: str) -> Path:
    file = folder / "bear.toml"
    file.write_text(text, encoding="utf-8")
    return file


def read(file: Path | None = None, **sources: object) -> Settings:
    return read_settings(file, **{"environ": {}, **sources})  # type: ignore[arg-type]


def problems(file: Path | None = None, **sources: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(file, **sources)
    return [str(problem).removeprefix(f"{file}:") for problem in caught.value.args]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lisen = []", "1: there is no setting 'lisen'; did you mean 'listen'?"),
        (
            "\n[limits]\nmax_answer = 1",
            "3: there is no setting 'limits.max_answer'; did you mean 'limits.max_answers'?",
        ),
        ("max_answers = 1", "1: there is no setting 'max_answers'; did you mean 'limits.max_answers'?"),
        (
            "[models.m.load_options]\nthread = 1",
            "2: there is no setting 'models.m.load_options.thread'; "
            "did you mean 'models.m.load_options.threads'?",
        ),
        ("[model.m]\na = 1", "1: there is no setting 'model'; did you mean 'models'?"),
        ("models.m.default.top_k = 1", "1: there is no setting 'models.m.default'; did you mean "),
        ("limits = { max_answer = 1 }", "1: there is no setting 'limits.max_answer'; did you mean "),
        ("zzz = 1", "1: there is no setting 'zzz'"),
    ],
)
def test_an_unknown_name_of_a_file_is_told_in_full_with_its_line_and_the_nearest(
    text: str, told: str, tmp_path: Path
) -> None:
    (problem,) = problems(write(tmp_path, text))
    assert problem.startswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('offline = "yes"', "1: offline: expected `bool`, got `str`"),
        ('max_pulls = "2"', "1: max_pulls: expected `int`, got `str`"),
        ('listen = [\n "unix:/a",\n 5]', "1: listen[1]: expected `str`, got `int`"),
        ("catalog = 5", "1: catalog: expected `str`, got `int`"),
        ("limits = 5", "1: limits: expected a table"),
        ("models = 5", "1: models: expected a table"),
        ("[limits]\nmax_answers = 65", "2: limits.max_answers: expected `int` <= 64"),
        (
            "[models.m.defaults]\ntop_k = 1.5",
            "2: models.m.defaults.top_k: expected `int | null`, got `float`",
        ),
        ("\nmax_pulls = 0", "2: max_pulls: must be above 0, is 0"),
    ],
)
def test_a_wrong_value_of_a_file_is_told_with_its_line(text: str, told: str, tmp_path: Path) -> None:
    assert problems(write(tmp_path, text)) == [told]


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "a = 1\n[limits]\nb = 1\nmax_answers = 0\n")
    told = problems(file, environ={"BEAR_OFFLINE": "maybe"}, texts={"limits.c": "1"})
    assert [line.partition(":")[0] for line in told] == ["1", "3", "4", "BEAR_OFFLINE", "--set"]


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ({"environ": {"BEAR_MAX_PULLS": "many"}}, "BEAR_MAX_PULLS: max_pulls: expected `int`, got 'many'"),
        ({"environ": {"BEAR_MAX_PULLS": "0"}}, "BEAR_MAX_PULLS: max_pulls: must be above 0, is 0"),
        (
            {"environ": {"BEAR_LIMITS_MAX_ANSWERS": "65"}},
            "BEAR_LIMITS_MAX_ANSWERS: limits.max_answers: expected `int` <= 64",
        ),
        ({"texts": {"max_pulls": "x"}}, "--set: max_pulls: expected `int`, got 'x'"),
        ({"texts": {"max_pull": "1"}}, "--set: there is no setting 'max_pull'; did you mean 'max_pulls'?"),
        ({"texts": {"limits": "1"}}, "--set: there is no setting 'limits'"),
        ({"flags": {"max_pulls": -1}}, "--max-pulls: max_pulls: must be above 0, is -1"),
    ],
)
def test_a_wrong_value_names_its_variable_or_its_flag(sources: dict[str, object], told: str) -> None:
    (problem,) = problems(**sources)
    assert problem.startswith(told)


def test_an_unknown_variable_is_a_warning_that_names_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = load_config(environ={"BEAR_LOG_LEVL": "DEBUG", "BEAR_PORT_50051_TCP": "x"})
    assert made == load_config(environ={})
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert caplog.messages[0] == "BEAR_LOG_LEVL: there is no setting 'log_levl'; did you mean 'log_level'?"


@pytest.mark.parametrize("name", [name for name, setting in all_settings().items() if setting.variable])
def test_an_empty_variable_is_not_given(name: str) -> None:
    assert read(environ={all_settings()[name].variable: ""}) == read()


def test_variables_of_two_settings_are_never_the_same() -> None:
    variables = [setting.variable for setting in all_settings().values() if setting.variable]
    assert len({*variables}) == len(variables)


def test_origins_tell_where_each_value_comes_from(tmp_path: Path) -> None:
    file = write(tmp_path, "offline = true\nmax_pulls = 3\nload = ['a']\n[limits]\nmax_answers = 4\n")
    environ = {"BEAR_MAX_PULLS": "4", "BEAR_LIMITS_MAX_CHOICES": "5", "HF_HOME": "/h"}
    made = read(file, environ=environ, flags={"load": ["b"]}, texts={"stop_grace_s": "6"})
    assert made.origins | {"models_dir": "default"} == {
        "offline": f"{file}:1",
        "max_pulls": "BEAR_MAX_PULLS",
        "load": "--load",
        "limits.max_answers": f"{file}:5",
        "limits.max_choices": "BEAR_LIMITS_MAX_CHOICES",
        "stop_grace_s": "--set",
        "models_dir": "default",
        "hub_cache": "HF_HOME",
        "state_dir": "default",
    }
    assert (made.config.max_pulls, made.config.limits.max_answers, made.config.limits.max_choices) == (
        4,
        4,
        5,
    )
    assert (made.config.load, made.config.stop_grace_s) == (["b"], 6.0)


def test_the_settings_as_toml_say_the_same_when_read_again(tmp_path: Path) -> None:
    text = (
        'catalog = "/x \\"y\\" \\u007f"\nallow_path = ["/a", "/b c"]\nstop_grace_s = inf\n'
        '[models."a/b:Q4.x".defaults]\ntop_k = 4\n[models.c.load_options]\nkv_cache_type = "f16"\n'
    )
    made = read(write(tmp_path, text), environ={"BEAR_WITHDRAWAL_S": "1.5", "BEAR_LIMITS_MAX_ANSWERS": "3"})
    assert made.config.models.keys() == {"a/b:Q4.x", "c"}
    shown = to_toml(made)
    again = read(write(tmp_path, shown))
    assert again.config == made.config
    assert "# reflection is not set" in shown
    assert "# BEAR_WITHDRAWAL_S" in shown


def test_the_settings_as_json_have_values_and_origins() -> None:
    shown = msgspec.json.decode(to_json(read(environ={"BEAR_STOP_GRACE_S": "inf"})))
    assert shown["file"] is None
    assert shown["settings"]["stop_grace_s"] == {"value": "inf", "origin": "BEAR_STOP_GRACE_S"}
    assert shown["settings"]["limits.max_answers"] == {"value": 16, "origin": "default"}
    known = {name for name, setting in all_settings().items() if "NAME" not in name and "[]" not in name}
    assert shown["settings"].keys() == known


def test_secrets_are_shown_by_no_form() -> None:
    made = read(environ={"BEAR_HUB_TOKEN": "hf_secret"})
    assert made.config.hub_token == "hf_secret"
    for shown in (to_toml(made), to_json(made), repr(made.config), repr(made)):
        assert "hf_secret" not in shown
        assert "***" in shown
    assert "***" not in to_toml(read())


def test_every_setting_that_sounds_secret_is_marked() -> None:
    sounding = ("token", "secret", "password")
    found = [
        name
        for name, setting in all_settings().items()
        if name.rpartition(".")[2].endswith(sounding) and setting.type_name == "text"
    ]
    assert found
    assert [name for name in found if not all_settings()[name].is_secret] == []


def test_what_reloads_is_a_setting_or_a_table_of_settings() -> None:
    assert reloading()
    assert [
        name
        for name in reloading()
        if not any(f"{known}.".startswith(f"{name}.") for known in all_settings())
    ] == []


def test_a_given_file_comes_before_the_variable_and_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / name)
    assert find_file(environ={}) is None
    own = tmp_path / "bear-grpc" / "bear.toml"
    own.parent.mkdir()
    own.touch()
    assert find_file(environ={}) == own
    assert find_file(environ={"BEAR_CONFIG": "/v"}) == Path("/v")
    assert find_file(environ={"BEAR_CONFIG": ""}) is None
    assert find_file(Path("/f"), {"BEAR_CONFIG": "/v"}) == Path("/f")


def test_the_working_folder_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "offline = true\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: tmp_path / "none")
    assert find_file(environ={}) is None


def test_lines_are_found_past_strings_lists_and_comments() -> None:
    text = '''a = 1
# b = 2
c = """
d = 3
[e]
""" # """
f = [
  "x", # ]
  ["y"],
  [1, "]"]
]
g = "[" # [
h.i = 1
[j . "k.l"]
m = \'\'\'n = 1
n = 2\'\'\'
[[o]]
p = 1
[o.q]
r = 1
[[o]]
p = { s = [1, 2], t = "}" }
u = """v""w"""
w = 1
'''
    msgspec.toml.decode(text)
    expected = {
        "a": 1,
        "c": 3,
        "f": 7,
        "g": 12,
        "h.i": 13,
        "j.k.l": 14,
        "j.k.l.m": 15,
        "o[0]": 17,
        "o[0].p": 18,
        "o[0].q": 19,
        "o[0].q.r": 20,
        "o[1]": 21,
        "o[1].p": 22,
        "o[1].u": 23,
        "o[1].w": 24,
    }
    assert lines_of(text) == expected


VALUES = st.one_of(
    st.integers(),
    st.text(max_size=8),
    st.lists(st.text(max_size=4), max_size=3),
    st.dictionaries(st.sampled_from("xyz"), st.integers(), max_size=2),
)


@given(
    st.dictionaries(st.sampled_from("abcd"), st.dictionaries(st.sampled_from("efg"), VALUES)), st.booleans()
)
def test_lines_hold_for_whatever_is_written(tables: dict[str, dict[str, object]], spread: bool) -> None:
    lines, expected = [], {}
    for table, values in tables.items():
        lines.append(f"[{table}]")
        expected[table] = len(lines)
        for key, value in values.items():
            text = toml_value(value)
            if spread and isinstance(value, list):
                text = "[\n" + "".join(f"{toml_value(item)}, # ] =\n" for item in value) + "]"
            expected[f"{table}.{key}"] = len(lines) + 1
            lines += f"{key} = {text} # [x]".split("\n")
    text = "\n".join(lines)
    assert msgspec.toml.decode(text) == tables
    assert lines_of(text) == expected
    assert lines_of(text.replace("\n", "\r\n")) == expected


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    per_minute: Annotated[Annotated[int, msgspec.Meta(ge=1)] | None, about("calls")] = None


class Door(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    address: str
    colours: frozenset[Colour] = frozenset()
    names: tuple[str, ...] | None = None
    quota: Quota = Quota()


class House(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tables of every form that settings may have."""

    doors: list[Door] = []
    guests: dict[str, Door] = {}
    key: Annotated[str, about("opens", secret=True)] = ""
    cellar: Quota | None = None


def house(text: str) -> tuple[list[str], House | None]:
    """What is wrong, or the house."""
    wrong: list[str] = []
    lines = lines_of(text)
    checked = convert(msgspec.toml.decode(text), House, lambda name: f"{nearest_line(lines, name)}", wrong)
    return wrong, None if wrong else msgspec.convert(checked.value, House)


def test_tables_of_every_form_are_settings() -> None:
    found = {setting.name: setting for setting in settings_of(House)}
    assert list(found) == [
        *("doors[].address", "doors[].colours", "doors[].names", "doors[].quota.per_minute"),
        *("guests.NAME.address", "guests.NAME.colours", "guests.NAME.names", "guests.NAME.quota.per_minute"),
        *("key", "cellar.per_minute"),
    ]
    assert [name for name, setting in found.items() if setting.variable] == ["key", "cellar.per_minute"]
    assert found["doors[].address"].default is msgspec.NODEFAULT
    assert found["doors[].colours"].type_name == "list of `red`, `blue`"
    assert found["doors[].names"].type_name == "list of text"


def test_tables_of_every_form_are_checked() -> None:
    text = (
        '[[doors]]\naddress = "a"\ncolours = ["red"]\n[[doors]]\nnames = [1]\ncolor = ["red"]\n'
        '[guests."x.y".quota]\nper_minute = 0\n[cellar]\nper_minut = 1\n'
    )
    wrong, _ = house(text)
    assert [line.partition("; ")[0] for line in wrong] == [
        "6: there is no setting 'doors[1].color'",
        "5: doors[1].names[0]: expected `str`, got `int`",
        "4: doors[1].address: is required",
        "8: guests.x.y.quota.per_minute: expected `int` >= 1",
        "7: guests.x.y.address: is required",
        "10: there is no setting 'cellar.per_minut'",
    ]
    assert house("doors = 1")[0] == ["1: doors: expected tables, written as [[doors]]"]


def test_tables_of_every_form_are_shown_as_they_can_be_read() -> None:
    text = (
        'key = "k"\n[[doors]]\naddress = "a"\ncolours = ["red", "blue"]\n'
        '[[doors]]\naddress = "b"\nnames = []\n[doors.quota]\nper_minute = 3\n'
        '[guests."x.*"]\naddress = "c"\n[cellar]\nper_minute = 2\n'
    )
    _, made = house(text)
    assert made is not None
    shown = to_toml(Settings(made, {}))  # type: ignore[arg-type]
    assert '"***"' in shown
    assert house(shown) == ([], msgspec.structs.replace(made, key="***"))
