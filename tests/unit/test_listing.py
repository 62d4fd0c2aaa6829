"""Which files of a repository a reference means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bear_grpc.errors import BearError, HubAnswerInvalid, InvalidField, ModelNotFound
from bear_grpc.store.listing import Listed, label_of, pin
from bear_grpc.store.reference import Reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHA256 = "ab" * 32
REPO = "owner/repo"


def listed(*files: str) -> dict[str, Listed]:
    return {file: Listed(1000, SHA256) for file in files}


def files_of(reference: Reference, *files: str) -> list[str]:
    return [file.file for file in pin(reference, COMMIT, listed(*files)).files]


@pytest.mark.parametrize(
    ("file", "label"),
    [
        ("llama-3.2-1b.Q4_K_M.gguf", "Q4_K_M"),
        ("llama-3.2-1b-q4_k_m.gguf", "Q4_K_M"),
        ("llama_Q8_0.gguf", "Q8_0"),
        ("folder/Q4_K_M/llama-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL"),
        ("llama-IQ2_XXS.gguf", "IQ2_XXS"),
        ("llama-BF16.gguf", "BF16"),
        ("llama-f16.gguf", "F16"),
        ("gpt-oss-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("Q4_0.gguf", "Q4_0"),
        ("llama.gguf", ""),
        ("Q4_0/llama.gguf", ""),
        ("llama-Q4_0-new.gguf", ""),
        ("faq4_0.gguf", ""),
    ],
)
def test_quantization_is_read_from_the_end_of_a_name(file, label):
    assert label_of(file) == label


@pytest.mark.parametrize("file", ["a-Q4_K_M.gguf", "a.q4_k_m.gguf", "a_Q4_k_M.gguf", "x/a-Q4_K_M.gguf"])
def test_quantization_is_found_without_regard_to_case(file):
    resolved = pin(Reference(REPO, quant="q4_K_m"), COMMIT, listed(file, "a-Q4_K_S.gguf", "README.md"))
    assert resolved.files[0].file == file
    assert resolved.name == "owner/repo:Q4_K_M"


@pytest.mark.parametrize("quant", ["M", "K_M", "4_K_M", "Q4_K", "Q4", "B"])
def test_part_of_a_quantizations_name_is_not_enough(quant):
    with pytest.raises(ModelNotFound):
        pin(Reference(REPO, quant=quant), COMMIT, listed("llama-1B-Q4_K_M.gguf"))


def test_quantization_of_an_unknown_kind_is_found_by_its_ending():
    assert files_of(Reference(REPO, quant="turbo"), "a-turbo.gguf", "a-slow.gguf") == ["a-turbo.gguf"]


def test_variant_stands_for_the_quantization_where_it_is_alone():
    assert files_of(Reference(REPO, quant="Q4_K_XL"), "a-UD-Q4_K_XL.gguf") == ["a-UD-Q4_K_XL.gguf"]
    both = ("a-UD-Q4_K_M.gguf", "a-Q4_K_M.gguf")
    assert files_of(Reference(REPO, quant="Q4_K_M"), *both) == ["a-Q4_K_M.gguf"]
    assert files_of(Reference(REPO, quant="UD-Q4_K_M"), *both) == ["a-UD-Q4_K_M.gguf"]


def test_companions_of_a_model_are_passed_over():
    files = ("a-F16.gguf", "mmproj-a-F16.gguf", "a.imatrix-F16.gguf", "a-adapter-F16.gguf", "lora-F16.gguf")
    assert files_of(Reference(REPO, quant="F16"), *files) == ["a-F16.gguf"]
    assert files_of(Reference(REPO, "mmproj-a-F16.gguf"), *files) == ["mmproj-a-F16.gguf"]


def test_several_files_of_a_quantization_are_named():
    with pytest.raises(InvalidField) as caught:
        pin(Reference(REPO, quant="Q8_0"), COMMIT, listed(*(f"{name}-Q8_0.gguf" for name in "abcde")))
    [violation] = caught.value.violations
    assert violation.field == "name"
    assert "owner/repo/a-Q8_0.gguf, owner/repo/b-Q8_0.gguf" in violation.description
    assert "and 2 more" in violation.description


def test_nearest_quantizations_are_told():
    files = ("a-Q4_K_M.gguf", "a-Q4_K_S.gguf", "a-Q8_0.gguf", "a-F16.gguf", "mmproj-BF16.gguf")
    with pytest.raises(ModelNotFound) as caught:
        pin(Reference(REPO, quant="Q4_K_L", revision="v1"), COMMIT, listed(*files))
    nearest = caught.value.metadata["nearest"].split(",")
    assert len(nearest) == 3
    assert {"owner/repo:Q4_K_M@v1", "owner/repo:Q4_K_S@v1"} < set(nearest)
    assert caught.value.metadata["model"] == "owner/repo:Q4_K_L@v1"


def test_nearest_files_are_told():
    with pytest.raises(ModelNotFound) as caught:
        pin(Reference(REPO, "model-q4.gguf"), COMMIT, listed("x/model-Q4.gguf", "README.md"))
    assert caught.value.metadata["nearest"] == "owner/repo/x/model-Q4.gguf"


@pytest.mark.parametrize(
    ("labels", "chosen"),
    [
        (["Q8_0", "Q4_K_M", "Q4_K_S", "F16"], "Q4_K_M"),
        (["Q8_0", "Q4_0", "Q2_K"], "Q4_0"),
        (["Q8_0", "Q5_K_M", "Q2_K"], "Q5_K_M"),
        (["F32", "BF16"], "BF16"),
        (["IQ1_S"], "IQ1_S"),
    ],
)
def test_usual_quantization_is_taken_where_none_is_named(labels, chosen):
    resolved = pin(
        Reference(REPO), COMMIT, listed(*(f"a-{label}.gguf" for label in labels), "mmproj-F16.gguf")
    )
    assert [file.file for file in resolved.files] == [f"a-{chosen}.gguf"]
    assert resolved.name == f"owner/repo:{chosen}"


def test_only_file_is_taken_where_it_names_no_quantization():
    resolved = pin(Reference(REPO), COMMIT, listed("a.gguf", "mmproj.gguf"))
    assert resolved.name == "owner/repo/a.gguf"


def test_nothing_is_chosen_among_files_that_cannot_be_told_apart():
    with pytest.raises(InvalidField):
        pin(Reference(REPO), COMMIT, listed("a.gguf", "b.gguf"))


def test_repository_without_models_has_none():
    with pytest.raises(ModelNotFound) as caught:
        pin(Reference(REPO), COMMIT, listed("README.md", "mmproj-F16.gguf"))
    assert caught.value.metadata == {"model": "owner/repo", "nearest": ""}


PARTS = tuple(f"x/a-Q8_0-{number:05d}-of-00003.gguf" for number in (1, 2, 3))


@pytest.mark.parametrize(
    "reference",
    [Reference(REPO, quant="Q8_0"), Reference(REPO), *(Reference(REPO, part) for part in PARTS)],
)
def test_split_model_has_all_its_parts_in_order(reference):
    assert files_of(reference, *reversed(PARTS)) == list(PARTS)


@pytest.mark.parametrize("missing", PARTS[1:])
def test_split_model_without_a_part_is_refused(missing):
    with pytest.raises(HubAnswerInvalid, match=missing):
        files_of(Reference(REPO, quant="Q8_0"), *(part for part in PARTS if part != missing))


def test_part_beyond_the_number_of_parts_is_refused():
    with pytest.raises(HubAnswerInvalid):
        files_of(Reference(REPO, "a-00004-of-00003.gguf"), "a-00004-of-00003.gguf")
    with pytest.raises(HubAnswerInvalid):
        files_of(Reference(REPO, "a-00000-of-00000.gguf"), "a-00000-of-00000.gguf")


@pytest.mark.parametrize(
    "commit", [None, "", "main", COMMIT.upper(), COMMIT + "\n", COMMIT[1:], "../" * 13 + "a", 7]
)
def test_commit_that_is_none_is_refused(commit):
    with pytest.raises(HubAnswerInvalid):
        pin(Reference(REPO, "a.gguf"), commit, listed("a.gguf"))


def test_another_commit_than_the_one_asked_for_is_refused():
    with pytest.raises(HubAnswerInvalid, match="f" * 40):
        pin(Reference(REPO, "a.gguf", revision="f" * 40), COMMIT, listed("a.gguf"))


@pytest.mark.parametrize(
    "wrong",
    [
        Listed(1000, None),
        Listed(1000, SHA256.upper()),
        Listed(1000, SHA256[1:]),
        Listed(1000, "../../../../evil"),
        Listed(1000, SHA256 + "\n"),
        Listed(1000, ["a"]),
        Listed(None, SHA256),
        Listed(0, SHA256),
        Listed(-1, SHA256),
        Listed(2**42 + 1, SHA256),
        Listed(True, SHA256),
        Listed(10.0, SHA256),
        Listed("1000", SHA256),
    ],
)
def test_file_that_cannot_be_verified_is_refused(wrong):
    with pytest.raises(HubAnswerInvalid):
        pin(Reference(REPO, "a.gguf"), COMMIT, {"a.gguf": wrong})


@pytest.mark.parametrize(
    "name", ["../a-Q8_0.gguf", "/etc/a-Q8_0.gguf", "a/./b-Q8_0.gguf", "a\0-Q8_0.gguf", "..\\a-Q8_0.gguf"]
)
def test_repository_with_a_hostile_name_is_refused(name):
    for reference in (Reference(REPO), Reference(REPO, quant="Q8_0"), Reference(REPO, "a.gguf")):
        with pytest.raises(HubAnswerInvalid):
            pin(reference, COMMIT, listed(name, "a.gguf"))


NAMES = st.lists(
    st.sampled_from(["a", "-", "Q4_K_M", "Q8_0", "/", "-00001-of-00002", "-00002-of-00002", "mmproj", "."]),
    max_size=6,
).map(lambda pieces: "".join(pieces) + ".gguf")


@given(st.sets(NAMES, max_size=6), st.sampled_from([None, "Q4_K_M", "Q8_0", "0"]), st.none() | NAMES)
def test_whatever_is_listed_ends_in_listed_files_or_a_typed_error(names, quant, file):
    reference = Reference(REPO, file, None if file else quant)
    try:
        resolved = pin(reference, COMMIT, listed(*names))
    except BearError:
        return
    assert {each.file for each in resolved.files} <= names
    assert resolved.name.startswith(REPO)
