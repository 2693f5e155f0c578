"""One MoE layer from bf16 weights to a checked output: `moejit demo`.

In: nothing but this machine. Out: a `Demo` with the trace of each call through the eight steps and
the comparison with the reference. On a GPU the call runs its kernel. Without one, a call for each
of sm_100a and sm_90a goes all the way to the launch, which is left out, and the reference gives
the output. The weights are made up; their shapes are those of Qwen3-30B-A3B.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from moejit.cache.entry import Entry
from moejit.codegen.arch import arch_for_capability
from moejit.codegen.errors import UnknownArch
from moejit.codegen.problem import MoeProblem
from moejit.runtime import dispatcher, events
from moejit.runtime.api import moe_nvfp4
from moejit.runtime.build import layer_key, token_bucket
from moejit.runtime.checks import check_arguments
from moejit.runtime.inspect import Inspection, inspect_entry, source_of_problem
from moejit.runtime.quantize import (
    MoeWeights,
    QuantizedActivations,
    dequantize_nvfp4,
    prepare_weights,
    quantize_activations,
)
from moejit.runtime.reference import Comparison, compare, moe_reference
from moejit.runtime.settings import scope, settings

__all__ = ["Accuracy", "Demo", "LayerInput", "Shape", "Trace", "run_demo"]

_T = TypeVar("_T")

# Compiled where there is no GPU that could run them: one of each family.
CPU_ARCHS = ("sm_100a", "sm_90a")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the layer and of the call."""

    hidden: int = 2048
    intermediate: int = 768
    experts: int = 128
    top_k: int = 8
    tokens: int = 64


@dataclass(frozen=True)
class LayerInput:
    """A layer and a call as a model has them, before quantization.

    Attributes:
        x: [T, H] bf16 activations.
        gate: [E, I, H] bf16.
        up: [E, I, H] bf16.
        down: [E, H, I] bf16.
        ids: [T, top_k] int32.
        scales: [T, top_k] fp32, each row sums to 1.
    """

    x: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    ids: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One call through the steps.

    Attributes:
        arch: target that it was for.
        backend: who ran it.
        problem: what was asked.
        seconds: time of each step that took place, by the kinds of `runtime.events`; ``check`` and
            ``problem`` were timed by themselves, ``cache`` is what the others leave of a cold call.
        total_s: the whole call.
        again_s: the same call once more: from the memory table to the launch.
        warm: whether the layer came from the cache on disk.
        kept: whether the layer is in the cache now; not so where the cache cannot be written.
        layer: what was loaded.
        source_lines: lines of the rendered files.
    """

    arch: str
    backend: str
    problem: MoeProblem
    seconds: Mapping[str, float]
    total_s: float
    again_s: float
    warm: bool
    kept: bool
    layer: Inspection
    source_lines: int


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How far the output is from what.

    Attributes:
        kernel: the output against the reference with float64 sums.
        unquantized_l2: relative L2 error of that reference against the layer in bf16 weights and
            fp32 arithmetic: what NVFP4 costs.
        cosine: cosine similarity of the same two.
        x_l2: relative L2 error of the quantized activations alone.
    """

    kernel: Comparison
    unquantized_l2: float
    cosine: float
    x_l2: float

    @property
    def right(self) -> bool:
        """Whether the output is that of the reference.

        A kernel adds in another order, so that an intermediate value next to a rounding boundary of
        FP4 may fall to its other side. A few such values can push single outputs out of tolerance;
        all of them together stay below the rounding of the bf16 output, 2**-8.
        """
        return self.kernel.passed or self.kernel.relative_l2 <= 2.0**-8


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What happened.

    Attributes:
        shape: sizes.
        device: name of the GPU, or ``CPU``.
        ran: who made the output: ``cuda`` or ``reference``.
        bf16_bytes: size of the weights before quantization.
        nvfp4_bytes: after, scales included.
        make_s: seconds to make the weights.
        quantize_s: seconds to quantize and lay them out.
        run_s: seconds of the call that made the output, with everything loaded, until it was there.
        traces: one a target.
        accuracy: of the output.
    """

    shape: Shape
    device: str
    ran: str
    bf16_bytes: int
    nvfp4_bytes: int
    make_s: float
    quantize_s: float
    run_s: float
    traces: tuple[Trace, ...]
    accuracy: Accuracy


def run_demo(say: Callable[[str], None] = lambda text: None) -> Demo:
    """Make, quantize, compile, run and check one layer.

    Args:
        say: told what begins, in a few words.
    """
    device, shape, archs = _choose_device()
    say("making bf16 weights")
    layer, make_s = _timed(device, lambda: make_layer(shape, device))
    say("the layer in fp32, for calibration and comparison")
    exact, largest = unquantized(layer)
    say("quantizing to NVFP4")
    (x, weights), quantize_s = _timed(device, lambda: quantize(layer, largest))
    given = arguments(shape, layer, x, weights)
    traces = []
    for arch in archs:
        say(f"a call for {arch}")
        trace, out = trace_call(shape, given, arch, device)
        traces.append(trace)
    run_s = traces[-1].again_s
    if device.type == "cpu":  # nothing was launched above
        say("running the reference")
        with scope(backend="reference"):
            out, run_s = _timed(device, lambda: moe_nvfp4(**given))
    say("comparing with the reference")
    return Demo(
        shape=shape,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        ran="cuda" if device.type == "cuda" else "reference",
        bf16_bytes=sum(w.nbytes for w in (layer.gate, layer.up, layer.down)),
        nvfp4_bytes=sum(w.nbytes for w in weights.arguments().values()),
        make_s=make_s,
        quantize_s=quantize_s,
        run_s=run_s,
        traces=tuple(traces),
        accuracy=judge(given, layer, x, out=out, exact=exact),
    )


def make_layer(shape: Shape, device: torch.device, seed: int = 0) -> LayerInput:
    """Weights of about 0.02 with a spread between channels, activations as after a norm layer."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    def weight(*size: int) -> torch.Tensor:
        made = torch.empty(size, dtype=torch.bfloat16, device=device)
        for expert in made:  # one at a time: fp32 copies of all experts need not fit
            rows, columns = expert.shape
            spread = torch.exp(0.35 * normal(rows, 1))
            expert.copy_(0.02 * spread * normal(rows, columns))
        return made

    x = normal(shape.tokens, shape.hidden) * torch.exp(0.5 * normal(shape.hidden))
    probability = normal(shape.tokens, shape.experts).softmax(dim=-1)
    scales, ids = probability.topk(shape.top_k, dim=-1)
    return LayerInput(
        x=x.bfloat16(),
        gate=weight(shape.experts, shape.intermediate, shape.hidden),
        up=weight(shape.experts, shape.intermediate, shape.hidden),
        down=weight(shape.experts, shape.hidden, shape.intermediate),
        ids=ids.int(),
        scales=scales / scales.sum(dim=-1, keepdim=True),
    )


def unquantized(layer: LayerInput) -> tuple[torch.Tensor, float]:
    """The layer in fp32, and the largest magnitude between its GEMMs: what calibration measures."""
    x, out, largest = layer.x.float(), torch.zeros_like(layer.x, dtype=torch.float32), 0.0
    for expert in range(layer.gate.shape[0]):
        tokens, slots = torch.where(layer.ids == expert)
        if len(tokens):
            rows = x[tokens]
            gate, up = rows @ layer.gate[expert].float().T, rows @ layer.up[expert].float().T
            y = torch.nn.functional.silu(gate) * up
            largest = max(largest, float(y.abs().max()))
            scale = layer.scales[tokens, slots].unsqueeze(-1)
            out.index_add_(0, tokens, scale * (y @ layer.down[expert].float().T))
    return out, largest


def quantize(layer: LayerInput, largest: float) -> tuple[QuantizedActivations, MoeWeights]:
    """Activations and weights as `moe_nvfp4` takes them."""
    x = quantize_activations(layer.x)
    weights = prepare_weights(
        layer.gate,
        layer.up,
        layer.down,
        x_global_scale=x.x_global_scale,
        fc2_input_scale=448 * 6 / largest,
    )
    return x, weights


def arguments(
    shape: Shape, layer: LayerInput, x: QuantizedActivations, weights: MoeWeights
) -> dict[str, Any]:
    """The keyword arguments of `moe_nvfp4`."""
    return {
        "x": x.x,
        "x_sf": x.x_sf,
        "token_selected_experts": layer.ids,
        "token_final_scales": layer.scales,
        **weights.arguments(),
        "num_experts": shape.experts,
        "top_k": shape.top_k,
    }


def trace_call(
    shape: Shape, given: dict[str, Any], arch: str, device: torch.device
) -> tuple[Trace, torch.Tensor]:
    """The first call for an architecture, with the time of each step, and the same call again."""
    backend = "cuda" if device.type == "cuda" else "null"
    seconds: dict[str, float] = {}

    def note(event: events.Event) -> None:
        seconds[event.kind] = seconds.get(event.kind, 0.0) + event.seconds

    with scope(backend=backend, arch=arch):
        with events.hook(note):
            _, total_s = _timed(device, lambda: moe_nvfp4(**given))
        out, again_s = _timed(device, lambda: moe_nvfp4(**given))
        _, check_s = _timed(device, lambda: check_arguments(**given))
        problem, problem_s = _timed(device, lambda: _problem(shape, arch))
        entry, source_lines = _entry(problem)
    seconds |= {"check": check_s, "problem": problem_s}
    if "compile" in seconds:
        seconds["cache"] = max(0.0, total_s - sum(seconds.values()))
    trace = Trace(
        arch=arch,
        backend=backend,
        problem=problem,
        seconds=seconds,
        total_s=total_s,
        again_s=again_s,
        warm="compile" not in seconds,
        kept=not entry.private,
        layer=inspect_entry(entry),
        source_lines=source_lines,
    )
    return trace, out


def judge(
    given: dict[str, Any],
    layer: LayerInput,
    x: QuantizedActivations,
    *,
    out: torch.Tensor,
    exact: torch.Tensor,
) -> Accuracy:
    """The output against the reference, and the reference against the unquantized layer."""
    reference, _ = moe_reference(**given, accumulate=torch.float64)
    cosine = torch.nn.functional.cosine_similarity(
        reference.double().flatten(), exact.double().flatten(), dim=0
    )
    decoded = dequantize_nvfp4(x.x, x.x_sf, x.x_global_scale)
    return Accuracy(
        kernel=compare(out, reference),
        unquantized_l2=_relative_l2(reference.float(), exact),
        cosine=float(cosine),
        x_l2=_relative_l2(decoded, layer.x.float()),
    )


def _choose_device() -> tuple[torch.device, Shape, tuple[str, ...]]:
    """The GPU if there are kernels for it, and all experts; else the CPU, and eight of them."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        try:
            arch = settings().arch or arch_for_capability(torch.cuda.get_device_capability(device))
        except UnknownArch:
            pass
        else:
            return device, Shape(), (arch,)
    return torch.device("cpu"), Shape(experts=8), CPU_ARCHS


def _problem(shape: Shape, arch: str) -> MoeProblem:
    """What the call asks for; `runtime.backends` says the same of a call's arguments."""
    return MoeProblem(
        arch=arch,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        top_k=shape.top_k,
        num_experts=shape.experts,
        num_local_experts=shape.experts,
        tokens=shape.tokens,
    )


def _entry(problem: MoeProblem) -> tuple[Entry, int]:
    """The entry that the dispatcher has just used for a problem, and the lines of its sources."""
    bucket = token_bucket(problem.tokens, problem.top_k)
    source = source_of_problem(replace(problem, tokens=bucket))
    entry = dispatcher.active().store.find(layer_key(source))
    assert entry is not None, "the call above has built it"
    return entry, sum(file.text.count("\n") for file in source.files)


def _timed(device: torch.device, work: Callable[[], _T]) -> tuple[_T, float]:
    """The result and the seconds until the device has it."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def _relative_l2(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
