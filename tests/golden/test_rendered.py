"""Rendered layers are what is committed under `expected/`.

A change of a template shows here as a change of the kernels that it makes. To accept it:
`pytest tests/golden --update-golden`, and read the diff.
"""

from __future__ import annotations

import difflib
import shutil
from functools import partial
from pathlib import Path

import pytest

from moejit.codegen import LayerSource, MoeProblem, candidates, render

EXPECTED = Path(__file__).parent / "expected"


def layer(arch: str, plan: int, *, deterministic: bool = False) -> LayerSource:
    problem = MoeProblem(
        arch=arch,
        hidden=2048,
        intermediate=768,
        top_k=8,
        num_experts=128,
        num_local_experts=128,
        tokens=1,
        deterministic=deterministic,
    )
    return render(problem, candidates(problem)[plan])


LAYERS = {
    "sm90_few_tokens_fused": partial(layer, "sm_90a", 0),
    "sm90_few_tokens_det": partial(layer, "sm_90a", 0, deterministic=True),
    "sm90_many_tokens_fused": partial(layer, "sm_90a", -1),
    "sm90_many_tokens_det": partial(layer, "sm_90a", -1, deterministic=True),
    "sm100_narrow_fused": partial(layer, "sm_100a", 0),
    "sm100_wide_fused": partial(layer, "sm_100a", 1),
}


@pytest.mark.parametrize("which", LAYERS)
def test_layer_is_as_committed(which: str, update_golden: bool) -> None:
    source = LAYERS[which]()
    folder = EXPECTED / source.name
    rendered = {f"{file.name}.txt": file.text for file in source.files if file.text}
    if update_golden:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, text in rendered.items():
            (folder / name).write_text(text, "utf-8")
    assert folder.is_dir(), f"no {folder.relative_to(EXPECTED)}: run with --update-golden"
    expected = {path.name: path.read_text("utf-8") for path in folder.iterdir()}
    assert sorted(rendered) == sorted(expected)
    differing = [name for name in rendered if rendered[name] != expected[name]]
    if differing:
        name = differing[0]
        before, after = expected[name].splitlines(), rendered[name].splitlines()
        diff = difflib.unified_diff(
            before, after, f"committed/{name}", f"rendered/{name}", n=1, lineterm=""
        )
        pytest.fail(f"{source.name}: {', '.join(differing)} differ.\n" + "\n".join([*diff][:60]))


def test_no_expected_layer_is_left_over(update_golden: bool) -> None:
    names = {make().name for make in LAYERS.values()}
    for folder in EXPECTED.iterdir():
        if update_golden and folder.name not in names:
            shutil.rmtree(folder)
    assert {folder.name for folder in EXPECTED.iterdir()} == names
