"""`moejit demo` on a small layer: each step is shown, the output checked, the second run warm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moejit.runtime import demo
from moejit.runtime.settings import scope

Run = Callable[..., Any]
SMALL = demo.Shape(hidden=128, intermediate=64, experts=4, top_k=2, tokens=16)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cutlass", reason="compiles a layer")
    chosen = (torch.device("cpu"), SMALL, ("sm_90a",))
    monkeypatch.setattr(demo, "_choose_device", lambda: chosen)


def test_demo_is_cold_then_warm(moejit: Run, small: None) -> None:
    first = json.loads(moejit("demo", "--json").out)
    (trace,) = first["traces"]
    assert not trace["warm"]
    assert {"plan", "render", "compile", "cache", "load"} <= set(trace["seconds"])
    assert first["ran"] == "reference" and first["accuracy"]["kernel"]["passed"]
    # FP4 has two significant bits: tensors of this kind lose about a tenth each
    assert 0.05 < first["accuracy"]["unquantized_l2"] < 0.4
    assert 0.02 < first["accuracy"]["x_l2"] < 0.15
    second = moejit("demo")
    assert second.code == 0 and "This run was warm" in second.out
    for step in ("1 call", "2 problem", "3 plan", "4 render", "5 compile", "6 cache", "7 load"):
        assert step in second.out
    key = trace["layer"]["key"]
    assert f"inspect {key[:10]} --source" in second.out
    assert moejit("inspect", key[:10]).code == 0


def test_demo_works_with_a_cache_that_cannot_be_written(
    moejit: Run, small: None, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with scope(cache_dir=tmp_path / "file" / "cache"):
        done = moejit("demo")
    assert done.code == 0 and "right" in done.out
    assert "Nothing was kept" in done.out and "Run it again" not in done.out


def test_demo_that_may_not_compile_says_what_to_do(moejit: Run, small: None) -> None:
    with scope(jit="off"):
        done = moejit("demo")
    assert done.code == 2 and "moejit prewarm" in done.err and "Traceback" not in done.err


def test_demo_with_a_wrong_output_exits_with_1(
    moejit: Run, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = demo.moe_nvfp4
    monkeypatch.setattr(demo, "moe_nvfp4", lambda **given: real(**given) + 1)
    done = moejit("demo")
    assert done.code == 1 and "WRONG" in done.out


def test_routing_weights_of_the_made_up_layer_sum_to_one() -> None:
    layer = demo.make_layer(SMALL, torch.device("cpu"))
    torch.testing.assert_close(layer.scales.sum(dim=-1), torch.ones(SMALL.tokens))
    assert layer.ids.dtype == torch.int32
    again = demo.make_layer(SMALL, torch.device("cpu"))
    assert torch.equal(layer.gate, again.gate)
