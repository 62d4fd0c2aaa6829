"""Names on the hub: the forms that are accepted, those that are refused, and that none leaves a folder."""

from __future__ import annotations

import os.path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bear_grpc.errors import InvalidField
from bear_grpc.store.reference import Reference, check_source, file_problem, parse_reference, repo_id_problem
from bear_grpc.types import HubSource

COMMIT = "0123456789abcdef0123456789abcdef01234567"

PARTS = st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,20}[A-Za-z0-9_])?", fullmatch=True)
REPO_IDS = st.builds(lambda owner, repo: f"{owner}/{repo}", PARTS, PARTS).filter(
    lambda repo_id: repo_id_problem(repo_id) is None
)
QUANTS = st.from_regex(r"[A-Za-z0-9_.-]{1,32}", fullmatch=True)
REVISIONS = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_.\-/]{0,20}\Z").filter(lambda text: ".." not in text)
FILES = (
    st.lists(st.text(max_size=12), min_size=1, max_size=3)
    .map(lambda parts: "/".join(parts) + ".gguf")
    .filter(lambda file: file_problem(file) is None)
)
TRICKY_FILES = st.sampled_from(
    ["a.gguf@b.gguf", "@.gguf", "a@b.gguf", "a:b.gguf", ".gguf", "x/.gguf@v1/y.gguf"]
)
REFERENCES = st.one_of(
    st.builds(Reference, REPO_IDS, st.one_of(FILES, TRICKY_FILES), st.none(), REVISIONS | st.just("main")),
    st.builds(Reference, REPO_IDS, st.none(), QUANTS | st.none(), REVISIONS | st.just("main")),
)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("owner/repo:Q4_K_M", Reference("owner/repo", quant="Q4_K_M")),
        ("owner/repo:q4_k_m", Reference("owner/repo", quant="Q4_K_M")),
        ("owner/repo", Reference("owner/repo")),
        ("owner/repo.gguf", Reference("owner/repo.gguf")),
        ("owner/repo/a.gguf", Reference("owner/repo", "a.gguf")),
        ("owner/repo/folder/a b.gguf@v1.0", Reference("owner/repo", "folder/a b.gguf", revision="v1.0")),
        ("owner/repo/a.gguf@refs/pr/1", Reference("owner/repo", "a.gguf", revision="refs/pr/1")),
        (f"owner/repo/a.gguf@{COMMIT}", Reference("owner/repo", "a.gguf", revision=COMMIT)),
        (f"owner/repo:Q8_0@{COMMIT}", Reference("owner/repo", quant="Q8_0", revision=COMMIT)),
        ("hf.co/owner/repo:Q8_0", Reference("owner/repo", quant="Q8_0")),
        ("huggingface.co/owner/repo", Reference("owner/repo")),
        ("https://huggingface.co/owner/repo/a.gguf", Reference("owner/repo", "a.gguf")),
        ("https://hf.co/owner/repo", Reference("owner/repo")),
    ],
)
def test_every_form_of_a_name_is_understood(name, reference):
    assert parse_reference(name) == reference


@pytest.mark.parametrize("name", ["bear-demo", "", "owner:Q4_K_M", "C:\\models\\a.gguf"])
def test_name_without_a_slash_is_no_reference(name):
    assert parse_reference(name) is None


@pytest.mark.parametrize(
    "name",
    [
        "/",
        "owner/",
        "/models/a.gguf",
        "./models/a.gguf",
        "../models/a.gguf",
        "~/a/b.gguf",
        "hf.co/owner",
        "http://huggingface.co/owner/repo",
        "https://elsewhere.example/owner/repo",
        "owner/re po",
        "owner/re..po",
        "owner/re--po",
        "owner/.repo",
        "owner/repo.git",
        "-owner/repo",
        "owner/repo\n",
        "öwner/repo",
        "o" * 60 + "/" + "r" * 60,
        "owner/repo:",
        "owner/repo:Q4/K",
        "owner/repo:Q4 K",
        "owner/repo:" + "Q" * 33,
        "owner/repo:Q4_K_M\n",
        "owner/repo@",
        "owner/repo@a..b",
        "owner/repo/a.bin",
        "owner/repo/../a.gguf",
        "owner/repo/./a.gguf",
        "owner/repo//a.gguf",
        "owner/repo//etc/a.gguf",
        "owner/repo/a\\b.gguf",
        "owner/repo/a\0.gguf",
        "owner/repo/a\n.gguf",
        "owner/repo/a.gguf\n",
        "owner/repo/a\ud800.gguf",
        "owner/repo/a\u202e.gguf",
        "owner/repo/" + "a" * 252 + ".gguf",
        "owner/repo/" + "ä" * 126 + ".gguf",
        "owner/repo/" + "a/" * 300 + "b.gguf",
        "owner/repo/a.gguf@",
        "owner/repo/a.gguf@../../x",
        "owner/repo/a.gguf@-x",
        "owner/repo/a.gguf@v\u0661\n",
        "owner/repo/a.gguf@" + "v" * 129,
    ],
)
def test_malformed_name_is_refused(name):
    with pytest.raises(InvalidField) as caught:
        parse_reference(name)
    assert {violation.field for violation in caught.value.violations} == {"name"}


def test_all_that_is_wrong_with_a_name_is_told():
    with pytest.raises(InvalidField) as caught:
        parse_reference("owner/re..po/a.bin")
    assert len(caught.value.violations) == 2


@given(REFERENCES)
def test_name_gives_the_reference_back(reference):
    assert parse_reference(reference.name) == reference


@given(REFERENCES)
def test_one_reference_has_one_name(reference):
    again = parse_reference(f"https://huggingface.co/{reference.name}")
    assert again is not None
    assert again.name == reference.name


def test_usual_revision_is_left_out_of_the_name():
    assert Reference("owner/repo", "a.gguf").name == "owner/repo/a.gguf"
    assert Reference("owner/repo", quant="Q8_0").name == "owner/repo:Q8_0"
    assert Reference("owner/repo", "a.gguf", revision="v1").name == "owner/repo/a.gguf@v1"


PIECES = st.sampled_from(["..", ".", "", "/", "a", ".gguf", "\\", "\0", "~", "C:", "//", "../"])


@given(st.one_of(st.text(), st.lists(PIECES).map("".join), st.lists(PIECES).map("/".join)))
def test_no_accepted_file_leads_out_of_a_folder(text):
    file = f"{text}.gguf"
    assume(file_problem(file) is None)
    place = os.path.normpath(os.path.join("/folder", file))
    assert os.path.commonpath(["/folder", place]) == "/folder"
    assert place == f"/folder/{file}"


@given(st.text())
def test_any_text_is_understood_or_refused(name):
    for text in (name, f"owner/{name}", f"owner/repo/{name}", f"owner/repo/{name}.gguf@{name}"):
        try:
            reference = parse_reference(text)
        except InvalidField:
            continue
        assert reference is None or parse_reference(reference.name) == reference


def test_source_that_is_right_passes():
    check_source(HubSource("owner/repo", "folder/a.gguf", COMMIT))
    check_source(HubSource("owner/repo", "a.gguf"))


def test_each_wrong_field_of_a_source_is_named():
    with pytest.raises(InvalidField) as caught:
        check_source(HubSource("repo", "../a.gguf", "a..b"))
    assert [each.field for each in caught.value.violations] == [
        "source.repo_id",
        "source.file",
        "source.revision",
    ]
    with pytest.raises(InvalidField) as caught:
        check_source(HubSource("owner/repo", "a.gguf", ""), "models.x.source")
    assert [each.field for each in caught.value.violations] == ["models.x.source.revision"]
