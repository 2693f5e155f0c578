"""Workspace sections: aligned, apart, large enough, and the same in Python and in the host code."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejit.codegen import MoePlan, MoeProblem, candidates, render, workspace_layout
from moejit.codegen.layouts import ceil_div, sf_storage_bytes
from moejit.codegen.workspace import ALIGNMENT, padded_k

FIELDS: dict[str, Any] = {
    "hidden": 2880,
    "intermediate": 2880,
    "num_experts": 4096,
    "num_local_experts": 4096,
    "tokens": 0,
}


def layers() -> list[tuple[MoeProblem, MoePlan]]:
    """Both families, both finalize modes, every plan."""
    found = []
    for arch, top_k in (("sm_90a", 8), ("sm_100a", 1)):
        for deterministic in (False, True):
            problem = MoeProblem(arch=arch, top_k=top_k, deterministic=deterministic, **FIELDS)
            found += [(problem, plan) for plan in candidates(problem)]
    return found


LAYERS = layers()
all_layers = pytest.mark.parametrize(
    ("problem", "plan"),
    [pytest.param(a, p, id=f"{p.name}-{'det' if a.deterministic else 'fused'}") for a, p in LAYERS],
)
calls = st.tuples(st.integers(0, 70_000), st.integers(1, 4096))  # tokens, local experts


@all_layers
@settings(deadline=None)
@given(call=calls)
def test_sections_are_aligned_and_apart(
    problem: MoeProblem, plan: MoePlan, call: tuple[int, int]
) -> None:
    tokens, experts = call
    layout = workspace_layout(problem, plan)
    offsets = layout.offsets(tokens, experts)
    assert [*offsets] == [*(section.name for section in layout.sections), "end"]
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    counts = {
        "one": 1,
        "tokens": tokens,
        "slots": tokens * problem.top_k,
        "tiles": plan.max_tiles(tokens, problem.top_k, experts),
    }
    for section, (start, end) in zip(layout.sections, pairwise(offsets.values()), strict=True):
        size = counts[section.count] * section.bytes_each
        assert size <= end - start < size + ALIGNMENT
    assert layout.bytes(tokens, experts) == offsets["end"]


@all_layers
@settings(deadline=None)
@given(call=calls, more=st.tuples(st.integers(0, 300), st.integers(0, 300)))
def test_offsets_never_shrink(
    problem: MoeProblem, plan: MoePlan, call: tuple[int, int], more: tuple[int, int]
) -> None:
    """So a workspace for the largest call serves all smaller ones."""
    layout = workspace_layout(problem, plan)
    small = layout.offsets(*call)
    large = layout.offsets(call[0] + more[0], call[1] + more[1])
    assert all(small[name] <= large[name] for name in small)


def test_sections_hold_what_the_kernels_keep_there() -> None:
    for problem, plan in LAYERS:
        sections = {s.name: s for s in workspace_layout(problem, plan).sections}
        tile, hidden, intermediate = plan.token_tile, problem.hidden, problem.intermediate
        assert sections["row_slot"].bytes_each == sections["row_scale"].bytes_each == 4 * tile
        sums = sections["sums"]
        assert (sums.count, sums.bytes_each) == (
            "slots" if problem.deterministic else "tokens",
            4 * hidden,
        )
        if plan.family == "sm90":
            assert sections["x_bf16"].bytes_each == 2 * padded_k(hidden)
            assert sections["act"].bytes_each == 2 * padded_k(intermediate) * tile
        else:
            assert "x_bf16" not in sections
            assert sections["act"].bytes_each == intermediate // 2 * tile
            assert sections["act_sf"].bytes_each == sf_storage_bytes(tile, intermediate)


@pytest.mark.parametrize(("k", "padded"), [(64, 128), (128, 128), (2880, 2944), (4096, 4096)])
def test_padded_k(k: int, padded: int) -> None:
    assert padded_k(k) == padded


# ---- the bound on tiles --------------------------------------------------------------------------

PLANS = [
    plan
    for arch in ("sm_90a", "sm_100a")
    for plan in candidates(MoeProblem(arch=arch, top_k=1, **FIELDS))
]


@settings(deadline=None)
@given(
    plan=st.sampled_from(PLANS),
    top_k=st.integers(1, 32),
    rows=st.lists(st.integers(0, 400), min_size=1, max_size=300),
    elsewhere=st.integers(0, 1000),
)
def test_no_routing_needs_more_tiles_than_the_bound(
    plan: MoePlan, top_k: int, rows: list[int], elsewhere: int
) -> None:
    """`rows` is how many slots each local expert gets; `elsewhere` go to experts of other ranks."""
    tokens = ceil_div(sum(rows) + elsewhere, top_k)
    used = sum(ceil_div(count, plan.token_tile) for count in rows)
    assert used <= plan.max_tiles(tokens, top_k, len(rows))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_some_routing_reaches_the_bound(plan: MoePlan) -> None:
    tile = plan.token_tile
    for experts, full in ((1, 0), (5, 0), (5, 3), (64, 100)):
        # One row in each expert's last tile, and `full` more tiles in expert 0.
        slots = experts + full * tile
        assert plan.max_tiles(slots, 1, experts) == experts + full
    assert plan.max_tiles(3, 1, 4096) == 3  # fewer slots than experts: a tile each


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_no_tokens_need_no_tiles(plan: MoePlan) -> None:
    assert plan.max_tiles(0, 8, 4096) == 0


# ---- the host function's arithmetic --------------------------------------------------------------


def host_offsets(text: str, tokens: int, experts: int) -> tuple[dict[str, int], int]:
    """Runs the address arithmetic of a rendered `moe_layer` on plain ints."""
    body = text[text.index("    # Any routing fits") : text.index("    launch_route(")]
    lines = [line.strip() for line in body.splitlines()]
    constants = re.findall(r"^(?:TOP_K|TOKEN_TILE|ALIGNMENT) = .*$", text, re.MULTILINE)
    assert len(constants) == 3

    class Cutlass:
        min = staticmethod(min)

    base = 1 << 40
    values: dict[str, Any] = {
        "Int64": int,
        "cutlass": Cutlass,
        "tokens": tokens,
        "num_local_experts": experts,
        "workspace": base,
    }
    exec("\n".join([*constants, *lines]), values)
    names = re.findall(r"^(\w+) = at\b", "\n".join(lines), re.MULTILINE)
    return {name: values[name] - base for name in names}, values["max_tiles"]


HOST_CODE: dict[tuple[MoeProblem, MoePlan], str] = {}


def host_code(problem: MoeProblem, plan: MoePlan) -> str:
    if (problem, plan) not in HOST_CODE:
        (file,) = (f for f in render(problem, plan).files if f.name == "kernel.py")
        HOST_CODE[problem, plan] = file.text
    return HOST_CODE[problem, plan]


@all_layers
@settings(deadline=None)
@given(call=calls)
def test_host_function_places_the_sections_alike(
    problem: MoeProblem, plan: MoePlan, call: tuple[int, int]
) -> None:
    tokens, experts = call
    found, max_tiles = host_offsets(host_code(problem, plan), tokens, experts)
    expected = workspace_layout(problem, plan).offsets(tokens, experts)
    del expected["end"]
    assert found == expected
    assert max_tiles == plan.max_tiles(tokens, problem.top_k, experts)
