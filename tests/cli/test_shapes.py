"""Shapes on the command line and in files: what they mean, and what a mistake in one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from moejit.runtime.cli.shapes import (
    BadShape,
    LayerShape,
    expand_tokens,
    problems_of,
    read_shapes,
)

QWEN = LayerShape(hidden=2048, intermediate=768, top_k=8, experts=128)
REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        pytest.param("64", [64], id="one"),
        pytest.param("7,1, 64", [1, 7, 64], id="list"),
        pytest.param("1-8", [1, 2, 4, 8], id="range"),
        pytest.param("3-9", [3, 4, 8, 9], id="range_ends"),
        pytest.param("0-2", [0, 1, 2], id="from_zero"),
        pytest.param("1-4,100", [1, 2, 4, 100], id="both"),
    ],
)
def test_token_counts(text: str, counts: list[int]) -> None:
    assert expand_tokens(text) == counts


@pytest.mark.parametrize("text", ["", "a", "1-", "-4", "8-1", "1.5", "1-2-3"])
def test_bad_token_counts_are_named(text: str) -> None:
    with pytest.raises(BadShape, match="--tokens"):
        expand_tokens(text)


def test_problems_are_archs_times_finalize_times_tokens() -> None:
    shape = LayerShape(hidden=128, intermediate=64, top_k=2, experts=8, tokens="1,2")
    found = problems_of(shape, ["sm_90a", "sm_100a"])
    assert len(found) == 2 * 2 * 2
    assert {p.deterministic for p in found} == {False, True}
    assert {p.num_local_experts for p in found} == {8}


def test_archs_of_the_command_line_replace_those_of_the_layer() -> None:
    shape = LayerShape(hidden=128, intermediate=64, top_k=2, experts=8, arch=("sm_90a",))
    assert {p.arch for p in problems_of(shape, ["sm_103a"])} == {"sm_90a"}
    assert {p.arch for p in problems_of(shape, [], only=["sm_100a"])} == {"sm_100a"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"hidden": 100}, "hidden is 100", id="hidden"),
        pytest.param({"top_k": 0}, "top_k is 0", id="top_k"),
        pytest.param({"local_experts": 200}, "num_local_experts is 200", id="local_experts"),
        pytest.param({"local_experts": 0}, "num_local_experts is 0", id="no_experts"),
        pytest.param({"arch": ("sm_80",)}, "sm_80", id="arch"),
        pytest.param({"output_dtype": "fp8"}, "output_dtype is 'fp8'", id="output_dtype"),
        pytest.param({"ids_dtype": "int8"}, "ids_dtype is 'int8'", id="ids_dtype"),
        pytest.param({"finalize": "none"}, "finalize is 'none'", id="finalize"),
    ],
)
def test_field_that_cannot_be_is_named(change: dict[str, object], words: str) -> None:
    from dataclasses import replace

    with pytest.raises(BadShape) as caught:
        problems_of(replace(QWEN, **change), ["sm_90a"])  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_file_has_defaults_and_layers(tmp_path: Path) -> None:
    path = tmp_path / "shapes.toml"
    path.write_text(
        'arch = ["sm_90a"]\ntokens = [1, 7]\n'
        '[[layer]]\nname = "a"\nhidden = 128\nintermediate = 64\ntop_k = 2\nexperts = 8\n'
        "[[layer]]\nhidden = 256\nintermediate = 64\ntop_k = 2\nexperts = 8\n"
        'tokens = "4"\narch = "sm_100a,sm_103a"\n'
    )
    first, second = read_shapes(path)
    assert (first.arch, first.tokens) == (("sm_90a",), "1,7")
    assert (second.arch, second.tokens) == (("sm_100a", "sm_103a"), "4")
    assert "layer 1 (a)" in first.name and second.name.endswith("layer 2")


LAYER = "[[layer]]\nhidden = 128\nintermediate = 64\ntop_k = 2\nexperts = 8\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", "no [[layer]]", id="empty"),
        pytest.param("a =", "not TOML", id="syntax"),
        pytest.param("layer = 3", "no [[layer]]", id="not_a_table"),
        pytest.param("[[layer]]\nhidden = 128\n", "intermediate is missing", id="missing"),
        pytest.param(LAYER + "topk = 2\n", "unknown field 'topk'", id="unknown"),
        pytest.param(LAYER.replace("128", '"128"'), "hidden is '128'", id="text_for_number"),
        pytest.param(LAYER.replace("128", "true"), "hidden is True", id="true_for_number"),
        pytest.param(LAYER + "arch = 90\n", "arch is 90", id="arch"),
        pytest.param(LAYER + "pdl = 1\n", "pdl is 1", id="pdl"),
    ],
)
def test_mistake_in_a_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "shapes.toml"
    path.write_text(text)
    with pytest.raises(BadShape) as caught:
        read_shapes(path)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_file_in_the_documentation_is_right(tmp_path: Path) -> None:
    page = (REPO / "docs/cli.md").read_text("utf-8")
    path = tmp_path / "shapes.toml"
    path.write_text(page.partition("```toml\n")[2].partition("```")[0])
    layers = read_shapes(path)
    assert len(layers) == 2 and all(problems_of(layer, []) for layer in layers)
