"""The public call: its signature, and that its quick path refuses what the full check refuses."""

from __future__ import annotations

import inspect
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import random_problem

from moejit.runtime import BackendUnavailable, BadArgument, dispatcher, moe_nvfp4, scope
from moejit.runtime import cute_dsl_fused_moe_nvfp4 as alias
from moejit.runtime.launcher import Layer, bind
from moejit.runtime.reference import moe_reference
from moejit.runtime.workspace import Workspaces

FLASHINFER = {
    "x": inspect.Parameter.empty,
    "x_sf": inspect.Parameter.empty,
    "token_selected_experts": inspect.Parameter.empty,
    "token_final_scales": inspect.Parameter.empty,
    "w1_weight": inspect.Parameter.empty,
    "w1_weight_sf": inspect.Parameter.empty,
    "w1_alpha": inspect.Parameter.empty,
    "fc2_input_scale": inspect.Parameter.empty,
    "w2_weight": inspect.Parameter.empty,
    "w2_weight_sf": inspect.Parameter.empty,
    "w2_alpha": inspect.Parameter.empty,
    "num_experts": inspect.Parameter.empty,
    "top_k": inspect.Parameter.empty,
    "num_local_experts": None,
    "local_expert_offset": 0,
    "output_dtype": torch.bfloat16,
    "use_fused_finalize": True,
    "moe_output": None,
    "aux_stream": None,
    "enable_pdl": True,
}


def test_parameters_are_those_of_flashinfer() -> None:
    parameters = inspect.signature(moe_nvfp4).parameters
    assert {name: p.default for name, p in parameters.items()} == FLASHINFER
    assert list(parameters) == list(FLASHINFER)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    assert alias is moe_nvfp4


def test_cpu_tensors_run_on_the_reference() -> None:
    arguments = random_problem(tokens=7)
    with scope(backend="auto", arch=None):
        for _ in range(2):  # a new signature, then a known one
            assert torch.equal(moe_nvfp4(**arguments), moe_reference(**arguments)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_tensor_is_written_and_returned(dtype: torch.dtype) -> None:
    arguments = random_problem(tokens=3, output_dtype=dtype)
    out = torch.full((3, 128), float("nan"), dtype=dtype)
    with scope(backend="reference"):
        expected = moe_nvfp4(**arguments)
        for _ in range(2):
            out.fill_(float("nan"))
            assert moe_nvfp4(**{**arguments, "moe_output": out}) is out
            assert torch.equal(out, expected)


def test_no_tokens_gives_an_empty_output() -> None:
    with scope(backend="reference"):
        out = moe_nvfp4(**random_problem(tokens=0, output_dtype=torch.float16))
    assert out.shape == (0, 128) and out.dtype is torch.float16


def test_reference_makes_no_graph_and_writes_to_any_output() -> None:
    arguments = random_problem(tokens=3)
    with torch.inference_mode():
        out = torch.empty(3, 128, dtype=torch.bfloat16)
    leaf = torch.empty(3, 128, dtype=torch.bfloat16, requires_grad=True)
    arguments["token_final_scales"] = arguments["token_final_scales"].float().requires_grad_()
    with scope(backend="reference"):
        expected = moe_nvfp4(**arguments)
        assert not expected.requires_grad
        for given in (out, leaf):
            assert torch.equal(moe_nvfp4(**{**arguments, "moe_output": given}), expected)


def test_cuda_backend_without_cuda_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with scope(backend="cuda"), pytest.raises(BackendUnavailable, match="moejit doctor"):
        moe_nvfp4(**random_problem())


def test_emulator_backend_says_what_to_use_instead() -> None:
    with scope(backend="emulator"), pytest.raises(BackendUnavailable, match="reference"):
        moe_nvfp4(**random_problem())


def test_null_backend_needs_an_architecture() -> None:
    with scope(backend="null", arch=None), pytest.raises(BackendUnavailable, match="MOEJIT_ARCH"):
        moe_nvfp4(**random_problem())


# ---- the quick path ------------------------------------------------------------------------------


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The null backend with layers that only note how they were called."""
    calls: list[tuple[Any, ...]] = []

    def layer(self: Any, problem: Any, backend: Any) -> Layer:
        from moejit.codegen import select, workspace_layout

        plan = select(problem)
        layout = workspace_layout(problem, plan)
        return Layer(
            name="x", arch=problem.arch, plan=plan, layout=layout, function=lambda *a: None
        )

    monkeypatch.setattr(dispatcher.Dispatcher, "layer", layer)
    monkeypatch.setattr(
        "moejit.runtime.backends._no_launch", lambda *arguments: calls.append(arguments)
    )
    with scope(backend="null", arch="sm_90a", cache_dir=tmp_path):
        yield calls


def test_host_function_gets_addresses_and_sizes(quick: list[tuple[Any, ...]]) -> None:
    arguments = random_problem(tokens=5, num_local_experts=2, local_expert_offset=1)
    out = moe_nvfp4(**arguments)
    (called,) = quick
    assert len(called) == 17
    assert called[0] is out
    names = ["x", "x_sf", "token_selected_experts", "token_final_scales", "w1_weight"]
    names += ["w1_weight_sf", "w1_alpha", "fc2_input_scale", "w2_weight", "w2_weight_sf"]
    names += ["w2_alpha"]
    assert list(called[1:12]) == [arguments[name].data_ptr() for name in names]
    assert called[12] % 1024 == 0
    assert called[13:] == (5, 2, 1, 1)


MISTAKES: dict[str, Any] = {
    "none": lambda a: {"w2_weight": None},
    "dtype": lambda a: {"w1_alpha": a["w1_alpha"].double()},
    "shape": lambda a: {"w2_weight": a["w2_weight"][:, :64].contiguous()},
    "rows of ids": lambda a: {"token_selected_experts": a["token_selected_experts"][:3]},
    "strides": lambda a: {"token_final_scales": a["token_final_scales"].T.contiguous().T},
    "linear scales": lambda a: {"w1_weight_sf": a["w1_weight_sf"].contiguous()},
    "top_k": lambda a: {"top_k": 3},
    "offset": lambda a: {"local_expert_offset": 1},
    "output dtype": lambda a: {"output_dtype": torch.float32},
    "misaligned": lambda a: {"x": _misaligned(a["x"])},
    "misaligned scales": lambda a: {"w2_weight_sf": _misaligned(a["w2_weight_sf"])},
    "output shape": lambda a: {"moe_output": torch.empty(4, 128, dtype=torch.bfloat16)},
    "output strides": lambda a: {"moe_output": torch.empty(128, 5, dtype=torch.bfloat16).T},
    "meta activations": lambda a: {"x": a["x"].to("meta")},
    "meta ids": lambda a: {"token_selected_experts": a["token_selected_experts"].to("meta")},
    "freed activations": lambda a: _freed(a, "x"),
    "freed scales": lambda a: _freed(a, "token_final_scales"),
    "freed weight": lambda a: _freed(a, "w2_weight"),
    "freed alpha": lambda a: _freed(a, "w1_alpha"),
    "output freed": lambda a: _freed(
        {"moe_output": torch.empty(5, 128, dtype=torch.bfloat16)}, "moe_output"
    ),
    "output overlaps": lambda a: {
        "moe_output": a["w2_weight"].flatten()[: 5 * 256].view(torch.bfloat16).view(5, 128)
    },
}


def _freed(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    tensors[name].untyped_storage().resize_(0)
    return {name: tensors[name]}


def _misaligned(tensor: torch.Tensor) -> torch.Tensor:
    memory = torch.zeros(tensor.numel() + 64, dtype=torch.uint8)
    start = 8 - memory.data_ptr() % 16
    view = memory[start % 16 :].view(tensor.dtype)
    return view.as_strided(tensor.shape, tensor.stride())


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("warm", [False, True], ids=["new signature", "known signature"])
def test_mistake_is_refused_before_any_launch(
    quick: list[tuple[Any, ...]], mistake: str, warm: bool
) -> None:
    arguments = random_problem(tokens=5)
    if warm:
        moe_nvfp4(**arguments)
        out = torch.empty(5, 128, dtype=torch.bfloat16)
        moe_nvfp4(**{**arguments, "moe_output": out})
    quick.clear()
    with pytest.raises(BadArgument):
        moe_nvfp4(**{**arguments, **MISTAKES[mistake](arguments)})
    assert quick == []


def test_overhead_of_a_known_signature_is_small(quick: list[tuple[Any, ...]]) -> None:
    """5 us were measured, with nothing behind them; the bound leaves room for a busy machine."""
    arguments = random_problem(tokens=4)
    arguments["moe_output"] = torch.empty(4, 128, dtype=torch.bfloat16)
    positional = tuple(arguments.values())
    moe_nvfp4(*positional)
    best = min(timeit.repeat(lambda: moe_nvfp4(*positional), number=500, repeat=10)) / 500
    assert best < 25e-6


# ---- workspace -----------------------------------------------------------------------------------


def test_workspace_is_kept_grows_and_differs_by_stream() -> None:
    stream, capturing = 0, False
    spaces = Workspaces(torch.device("cpu"), lambda: stream, lambda: capturing)
    first = spaces.take(1000)
    assert spaces.take(500) is first and first[1] % 1024 == 0
    larger = spaces.take(4000)
    assert larger[0] >= 4000 and spaces.take(1000) is larger
    stream = 1
    assert spaces.take(1000)[1] != larger[1]
    assert spaces.kept_bytes >= 5000
    spaces.release()
    assert spaces.kept_bytes == 0


def test_capture_gets_memory_of_its_own() -> None:
    capturing = False
    spaces = Workspaces(torch.device("cpu"), lambda: 7, lambda: capturing)
    kept = spaces.take(1000)
    capturing = True
    captured = spaces.take(1000)
    assert captured[1] != kept[1]
    capturing = False
    assert spaces.take(1000) is kept


def test_launch_passes_each_call_its_own_addresses() -> None:
    from moejit.codegen import select, workspace_layout
    from moejit.codegen.problem import MoeProblem

    problem = MoeProblem(
        arch="sm_90a",
        hidden=128,
        intermediate=64,
        top_k=2,
        num_experts=4,
        num_local_experts=4,
        tokens=4,
    )
    plan = select(problem)
    seen: list[tuple[Any, ...]] = []
    layer = Layer(
        name="x",
        arch="sm_90a",
        plan=plan,
        layout=workspace_layout(problem, plan),
        function=lambda *arguments: seen.append(arguments),
    )
    spaces = Workspaces(torch.device("cpu"), int, bool)
    launch = bind(layer, spaces, (4, 4, 0, 132), None).run
    tensors = [torch.zeros(64, dtype=torch.uint8) for _ in range(5)]
    launch(*tensors, (), tuple(range(16, 16 * 8, 16)))
    launch(*tensors[:1], *reversed(tensors[1:]), (), tuple(range(160, 16 * 17, 16)))
    assert seen[0][1:5] == tuple(reversed(seen[1][1:5]))
    assert seen[0][5:12] == tuple(range(16, 16 * 8, 16))
    assert seen[1][5:12] == tuple(range(160, 16 * 17, 16))
    assert seen[0][13:] == (4, 4, 0, 132)
