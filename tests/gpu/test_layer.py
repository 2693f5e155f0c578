"""The whole layer on a GPU against the reference, through the public call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import random_problem

from moejit import runtime
from moejit.codegen.select import candidates
from moejit.runtime import dispatcher
from moejit.runtime.errors import BadArgument, CaptureWouldCompile
from moejit.runtime.reference import compare, moe_reference
from moejit.runtime.settings import scope
from moejit.runtime.trace import intermediate_differences, trace_layer

SMALL: dict[str, Any] = {"hidden": 512, "intermediate": 256, "num_experts": 8, "top_k": 2}


def poisoned(problem: dict[str, Any]) -> torch.Tensor:
    """An output full of NaN, so that an element nobody writes fails the comparison."""
    tokens, hidden = problem["x"].shape[0], 2 * problem["x"].shape[1]
    return torch.full((tokens, hidden), float("nan"), dtype=problem["output_dtype"], device="cuda")


def assert_right(problem: dict[str, Any]) -> None:
    """The result is the reference's, and the intermediate's codes are, but for proven ties."""
    out = runtime.moe_nvfp4(**{**problem, "moe_output": poisoned(problem)})
    reference, inter = moe_reference(**problem, accumulate=torch.float64, return_intermediate=True)
    assert inter is not None
    for random_poison in (False, True):
        traced = trace_layer(random_poison=random_poison, **problem)
        found = intermediate_differences(traced, inter, problem["fc2_input_scale"])
        assert found.code_gap < 2**-9, found
        assert found.scale_gap < 2**-12, found
    verdict = compare(out, reference)
    if found.codes + found.scales == 0:
        assert verdict.passed, verdict
    else:  # a flipped code moves one token's row: judge the others
        assert verdict.within > 0.98, (verdict, found)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "deterministic"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 64, 130, 515])
def test_result_is_the_references_at_every_token_count(tokens: int, fused: bool) -> None:
    problem = random_problem(tokens, **SMALL, device="cuda", seed=tokens)
    assert_right({**problem, "use_fused_finalize": fused})


@pytest.mark.parametrize(
    ("hidden", "intermediate"),
    [(64, 64), (128, 64), (64, 192), (320, 192), (448, 576), (2880, 320), (256, 2880)],
)
def test_tails_of_hidden_and_intermediate_are_right(hidden: int, intermediate: int) -> None:
    for fused in (True, False):
        problem = random_problem(50, hidden, intermediate, 8, 2, device="cuda", seed=hidden)
        assert_right({**problem, "use_fused_finalize": fused})


@pytest.mark.parametrize("top_k", [1, 3, 8, 32])
def test_top_k(top_k: int) -> None:
    assert_right(random_problem(40, 256, 128, 32, top_k, device="cuda", seed=top_k))


@pytest.mark.parametrize("offset", [0, 8, 24])
def test_expert_slice_contributes_only_its_own(offset: int) -> None:
    options: dict[str, Any] = {"num_local_experts": 8, "local_expert_offset": offset}
    assert_right(random_problem(100, 256, 128, 32, 4, device="cuda", seed=offset, **options))


def test_slices_of_all_experts_add_up_to_the_whole() -> None:
    whole = random_problem(60, 256, 128, 16, 4, device="cuda", seed=3)
    whole["use_fused_finalize"] = False
    total = torch.zeros(60, 256, device="cuda", dtype=torch.float64)
    for offset in range(0, 16, 4):
        part = dict(whole, num_local_experts=4, local_expert_offset=offset)
        for name in ("w1_weight", "w1_alpha", "w2_weight", "w2_alpha"):
            part[name] = whole[name][offset : offset + 4].contiguous()
        for name in ("w1_weight_sf", "w2_weight_sf"):
            storage = whole[name].permute(5, 2, 4, 0, 1, 3).contiguous()
            part[name] = storage[offset : offset + 4].contiguous()
        total += runtime.moe_nvfp4(**part).double()
    ref, _ = moe_reference(**whole, accumulate=torch.float64)
    assert (total - ref.double()).abs().max() < 0.02 * ref.double().abs().max()


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("scales_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output_dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_of_the_contract(
    ids_dtype: torch.dtype, scales_dtype: torch.dtype, output_dtype: torch.dtype
) -> None:
    dtypes = {"ids_dtype": ids_dtype, "scales_dtype": scales_dtype, "output_dtype": output_dtype}
    assert_right(random_problem(9, 128, 128, 4, 2, device="cuda", **dtypes))


def test_absent_and_foreign_ids_contribute_nothing() -> None:
    problem = random_problem(200, **SMALL, device="cuda", seed=5)
    ids = problem["token_selected_experts"]
    ids[::3, 0] = -1
    ids[1::3, 1] = 2**31 - 1
    ids[2] = -(2**31)
    ids[5] = 8
    for fused in (True, False):
        assert_right({**problem, "use_fused_finalize": fused})
        out = runtime.moe_nvfp4(**{**problem, "use_fused_finalize": fused})
        assert not out[[2, 5]].any()


def test_int64_ids_do_not_wrap_into_range() -> None:
    problem = random_problem(20, **SMALL, device="cuda", ids_dtype=torch.int64)
    problem["token_selected_experts"][:] = 2**32 + 3
    assert not runtime.moe_nvfp4(**problem).any()


@pytest.mark.parametrize("tokens", [1, 3, 40, 300])
def test_duplicate_ids_count_twice(tokens: int) -> None:
    problem = random_problem(tokens, 256, 128, 8, 4, device="cuda", seed=tokens)
    problem["token_selected_experts"][:, 1:] = problem["token_selected_experts"][:, :1]
    assert_right(problem)


def test_all_tokens_on_one_expert() -> None:
    problem = random_problem(700, 256, 128, 16, 1, device="cuda")
    problem["token_selected_experts"][:] = 11
    assert_right(problem)


def test_no_tokens_launch_nothing() -> None:
    problem = random_problem(0, **SMALL, device="cuda")
    assert runtime.moe_nvfp4(**problem).shape == (0, 512)


def test_nan_scale_of_one_token_stays_in_its_row() -> None:
    problem = random_problem(30, **SMALL, device="cuda", seed=2)
    problem["x_sf"].view(torch.uint8).view(30, -1)[7, 3] = 0x7F
    out = runtime.moe_nvfp4(**problem)
    assert out[7].isnan().all()
    assert not out[torch.arange(30) != 7].isnan().any()


def test_sign_bit_of_scales_is_ignored() -> None:
    problem = random_problem(30, **SMALL, device="cuda", seed=2)
    problem["use_fused_finalize"] = False
    plain = runtime.moe_nvfp4(**problem)
    for name in ("x_sf", "w1_weight_sf", "w2_weight_sf"):
        problem[name] = problem[name].view(torch.uint8) | 0x80
    assert torch.equal(plain, runtime.moe_nvfp4(**problem))


def test_deterministic_mode_gives_equal_bits() -> None:
    problem = random_problem(300, 512, 256, 8, 4, device="cuda", seed=1)
    problem["use_fused_finalize"] = False
    first = runtime.moe_nvfp4(**problem)
    assert all(torch.equal(first, runtime.moe_nvfp4(**problem)) for _ in range(10))


def test_every_plan_gives_the_deterministic_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(65, **SMALL, device="cuda", seed=9)
    problem["use_fused_finalize"] = False
    outs = []
    count = len(candidates(trace_layer(**problem).problem))
    for index in range(count):
        with scope(lock_timeout_s=599.0 - index):  # any change starts a fresh dispatcher
            monkeypatch.setattr(dispatcher, "select", lambda p, i=index: candidates(p)[i])
            assert_right(problem)
            outs.append(runtime.moe_nvfp4(**problem))
    assert all(torch.equal(outs[0], out) for out in outs)


@pytest.mark.parametrize("pdl", [True, False], ids=["pdl", "no-pdl"])
def test_layers_in_a_row_do_not_disturb_each_other(pdl: bool) -> None:
    """The workspace is shared: a layer must not start before the one before it is done with it."""
    problems = [
        {**random_problem(64, **SMALL, device="cuda", seed=s), "use_fused_finalize": False}
        for s in range(6)
    ]
    alone = []
    for problem in problems:
        alone.append(runtime.moe_nvfp4(**{**problem, "enable_pdl": pdl}))
        torch.cuda.synchronize()
    for _ in range(20):
        together = [runtime.moe_nvfp4(**{**problem, "enable_pdl": pdl}) for problem in problems]
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_graph_replays_with_new_inputs() -> None:
    problem = random_problem(16, **SMALL, device="cuda")
    problem["use_fused_finalize"] = False
    out = torch.empty(16, 512, dtype=torch.bfloat16, device="cuda")
    problem["moe_output"] = out
    runtime.moe_nvfp4(**problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runtime.moe_nvfp4(**problem)
    for seed in (4, 5):
        other = random_problem(16, **SMALL, device="cuda", seed=seed)
        for name in ("x", "x_sf", "token_selected_experts", "token_final_scales"):
            problem[name].copy_(other[name])
        out.fill_(float("nan"))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, runtime.moe_nvfp4(**{**problem, "moe_output": None}))


def test_capture_of_a_layer_that_never_ran_is_an_error() -> None:
    problem = random_problem(16, 192, 64, 4, 2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(CaptureWouldCompile), torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
        runtime.moe_nvfp4(**problem)


def test_streams_have_workspaces_of_their_own() -> None:
    problems = [
        {**random_problem(64, **SMALL, device="cuda", seed=s), "use_fused_finalize": False}
        for s in range(4)
    ]
    alone = [runtime.moe_nvfp4(**problem) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(10):
        outs = []
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                outs.append(runtime.moe_nvfp4(**problem))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(alone, outs, strict=True))


def test_tensor_on_another_device_is_named() -> None:
    problem = random_problem(4, **SMALL, device="cuda")
    problem["w2_alpha"] = problem["w2_alpha"].cpu()
    with pytest.raises(BadArgument, match="w2_alpha"):
        runtime.moe_nvfp4(**problem)


def test_warm_process_does_not_import_the_compiler(layers_dir: Path) -> None:
    problem = random_problem(5, **SMALL, device="cuda")
    runtime.moe_nvfp4(**problem)
    script = textwrap.dedent(
        f"""
        import json, sys
        sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        from problems import random_problem
        from moejit import runtime
        from moejit.runtime import events
        problem = random_problem(5, 512, 256, 8, 2, device="cuda")
        out = runtime.moe_nvfp4(**problem)
        seconds = {{kind: c.seconds for kind, c in events.counters().items()}}
        print(json.dumps([out.isfinite().all().item(), "cutlass" in sys.modules, seconds]))
        """
    )
    environment = {**os.environ, "MOEJIT_CACHE_DIR": str(layers_dir), "MOEJIT_JIT": "off"}
    ran = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    finite, imported, seconds = json.loads(ran.stdout.splitlines()[-1])
    assert finite
    assert not imported
    assert seconds["load"] <= 4e-3  # four kernels, at most a millisecond each
