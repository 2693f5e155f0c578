"""Weights are looked at once: what makes the dispatcher look again, and what it then sees."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from problems import random_problem

from moejit.runtime import dispatcher
from moejit.runtime.api import moe_nvfp4
from moejit.runtime.errors import BadArgument
from moejit.runtime.known_weights import KnownWeights

NAMES = (
    "w1_weight",
    "w1_weight_sf",
    "w1_alpha",
    "fc2_input_scale",
    "w2_weight",
    "w2_weight_sf",
    "w2_alpha",
)


def weights_of(problem: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return tuple(problem[name] for name in NAMES)


def add(known: KnownWeights, weights: tuple[torch.Tensor, ...]) -> int:
    return known.add(weights, tuple(w.data_ptr() for w in weights)).kind


def test_layers_of_one_shape_are_of_one_kind() -> None:
    known = KnownWeights()
    kinds = {add(known, weights_of(random_problem(seed=seed))) for seed in range(3)}
    assert len(kinds) == 1


@pytest.mark.parametrize("name", NAMES)
def test_kind_changes_with_shape_dtype_and_stride_of_each(name: str) -> None:
    known, problem = KnownWeights(), random_problem()
    plain = add(known, weights_of(problem))
    tensor = problem[name]
    others = [tensor[:0], tensor.to(torch.int32), tensor.unsqueeze(-1)]
    kinds = {add(known, weights_of({**problem, name: other})) for other in others}
    assert plain not in kinds
    assert len(kinds) == 3


def test_set_is_forgotten_with_its_first_tensor() -> None:
    known, problem = KnownWeights(), random_problem()
    add(known, weights_of(problem))
    assert len(known) == 1
    del problem["w2_alpha"]
    gc.collect()
    assert len(known) == 0


def test_moved_weights_are_used_where_they_are() -> None:
    problem, other = random_problem(seed=1), random_problem(seed=2)
    before = moe_nvfp4(**problem)
    problem["w1_weight"].data = other["w1_weight"].clone()
    after = moe_nvfp4(**problem)
    assert not torch.equal(before, after)
    assert torch.equal(after, moe_nvfp4(**{**problem, "w1_weight": other["w1_weight"]}))


def test_weights_that_moved_to_another_shape_are_checked_again() -> None:
    problem = random_problem()
    moe_nvfp4(**problem)
    problem["w2_alpha"].data = torch.ones(9)
    with pytest.raises(BadArgument, match="w2_alpha"):
        moe_nvfp4(**problem)


def test_new_tensor_in_the_place_of_a_dead_one_is_looked_at() -> None:
    """Python gives a new object the id of a dead one, and torch gives it its memory."""
    problem = random_problem()
    moe_nvfp4(**problem)
    for _ in range(50):
        del problem["w2_alpha"]
        problem["w2_alpha"] = torch.ones(4, dtype=torch.float64)[:4]
        with pytest.raises(BadArgument, match="w2_alpha"):
            moe_nvfp4(**problem)
        problem["w2_alpha"] = torch.ones(4)
        moe_nvfp4(**problem)


def test_table_does_not_grow_with_layers_that_are_gone() -> None:
    before = len(dispatcher.active().weights)
    for seed in range(5):
        moe_nvfp4(**random_problem(seed=seed))
    gc.collect()
    assert len(dispatcher.active().weights) <= before + 1
