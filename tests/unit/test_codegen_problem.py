"""What a problem may be, what the errors say, and which architectures there are."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from moejit.codegen import ARCHS, MoejitError, MoeProblem, arch_for_capability, arch_spec
from moejit.codegen.errors import BadProblem, NoVariantFits, TemplateError, UnknownArch
from moejit.codegen.problem import MAX_EXPERTS, MAX_SLOTS, MAX_TOP_K

BASE: dict[str, Any] = {
    "arch": "sm_90a",
    "hidden": 2048,
    "intermediate": 768,
    "top_k": 8,
    "num_experts": 128,
    "num_local_experts": 128,
    "tokens": 16,
}


@pytest.mark.parametrize(
    ("change", "field", "rule"),
    [
        pytest.param({"hidden": 0}, "hidden", "multiple of 64", id="hidden_zero"),
        pytest.param({"hidden": -64}, "hidden", "multiple of 64", id="hidden_negative"),
        pytest.param({"hidden": 2080}, "hidden", "multiple of 64", id="hidden_odd"),
        pytest.param({"hidden": 2048.0}, "hidden", "an int", id="hidden_float"),
        pytest.param({"intermediate": 32}, "intermediate", "multiple of 64", id="intermediate"),
        pytest.param({"top_k": 0}, "top_k", f"1..{MAX_TOP_K}", id="top_k_zero"),
        pytest.param({"top_k": MAX_TOP_K + 1}, "top_k", f"1..{MAX_TOP_K}", id="top_k_large"),
        pytest.param({"top_k": True}, "top_k", "an int", id="top_k_bool"),
        pytest.param({"num_experts": 0}, "num_experts", "at least 1", id="experts_zero"),
        pytest.param({"num_local_experts": 0}, "num_local_experts", "1..", id="local_zero"),
        pytest.param(
            {"num_local_experts": 129},
            "num_local_experts",
            "num_experts=128",
            id="local_beyond_all",
        ),
        pytest.param(
            {"num_experts": 9999, "num_local_experts": MAX_EXPERTS + 1},
            "num_local_experts",
            str(MAX_EXPERTS),
            id="local_beyond_limit",
        ),
        pytest.param({"tokens": -1}, "tokens", "at least 0", id="tokens_negative"),
        pytest.param(
            {"tokens": MAX_SLOTS // 8 + 1}, "tokens", f"at most {MAX_SLOTS // 8}", id="tokens_large"
        ),
        pytest.param({"ids_dtype": "uint32"}, "ids_dtype", "int32 or int64", id="ids"),
        pytest.param({"scales_dtype": "float64"}, "scales_dtype", "float32 or", id="scales"),
        pytest.param({"output_dtype": "float32"}, "output_dtype", "bfloat16 or", id="output"),
        pytest.param({"deterministic": 1}, "deterministic", "a bool", id="deterministic"),
        pytest.param({"pdl": None}, "pdl", "a bool", id="pdl"),
    ],
)
def test_refusal_names_field_value_and_rule(change: dict[str, Any], field: str, rule: str) -> None:
    with pytest.raises(BadProblem) as caught:
        MoeProblem(**{**BASE, **change})
    error = caught.value
    assert (error.field, error.value) == (field, change[field])
    assert rule in error.rule
    assert str(error) == f"{field} is {change[field]!r}; it must be {error.rule}"
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"hidden": 64, "intermediate": 64}, id="smallest"),
        pytest.param({"hidden": 2880, "intermediate": 2880}, id="half_tile"),
        pytest.param({"top_k": MAX_TOP_K}, id="top_k_limit"),
        pytest.param({"top_k": 8, "num_experts": 4, "num_local_experts": 1}, id="repeated_experts"),
        pytest.param({"num_experts": MAX_EXPERTS, "num_local_experts": MAX_EXPERTS}, id="experts"),
        pytest.param({"tokens": 0}, id="no_tokens"),
        pytest.param({"tokens": MAX_SLOTS // 8}, id="tokens_limit"),
    ],
)
def test_the_edges_are_allowed(change: dict[str, Any]) -> None:
    MoeProblem(**{**BASE, **change})


def test_padded_rows_of_the_largest_call_are_32_bit() -> None:
    assert MAX_SLOTS + 127 * MAX_EXPERTS < 2**31


def test_facts_are_every_field_but_the_sizes_of_a_call() -> None:
    problem = MoeProblem(**BASE)
    at_run_time = {"num_experts", "num_local_experts", "tokens"}
    assert set(problem.facts) == {f.name for f in fields(MoeProblem)} - at_run_time
    assert all(problem.facts[name] == getattr(problem, name) for name in problem.facts)


def test_problem_is_frozen_and_hashable() -> None:
    problem = MoeProblem(**BASE)
    assert hash(problem) == hash(MoeProblem(**BASE))
    with pytest.raises(FrozenInstanceError):
        problem.tokens = 1  # type: ignore[misc]


def test_rows_per_expert() -> None:
    assert MoeProblem(**BASE).rows_per_expert == 1.0


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(BadProblem("hidden", 65, "a positive multiple of 64"), id="BadProblem"),
        pytest.param(UnknownArch("sm_80", ("sm_90a",)), id="UnknownArch"),
        pytest.param(
            NoVariantFits("the problem", {"a": ["too big", "too slow"], "b": ["wrong family"]}),
            id="NoVariantFits",
        ),
        pytest.param(TemplateError("route.py.j2", 7, "'x' is undefined"), id="TemplateError"),
    ],
)
def test_errors_pickle_whole(error: MoejitError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.args, vars(copy)) == (str(error), error.args, vars(error))


def test_no_variant_fits_lists_every_reason() -> None:
    text = str(NoVariantFits("the problem", {"a": ["too big", "too slow"], "b": ["wrong family"]}))
    assert text.splitlines() == [
        "no variant can run the problem; tried 2:",
        "  a: too big; too slow",
        "  b: wrong family",
    ]


# ---- architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "name", "family"),
    [((9, 0), "sm_90a", "sm90"), ((10, 0), "sm_100a", "sm100"), ((10, 3), "sm_103a", "sm100")],
)
def test_arch_of_a_capability(capability: tuple[int, int], name: str, family: str) -> None:
    assert arch_for_capability(capability) == name
    assert (arch_spec(name).family, arch_spec(name).capability) == (family, capability)
    assert arch_spec(name).smem_bytes == 227 * 1024


@pytest.mark.parametrize("capability", [(8, 0), (9, 1), (12, 0)])
def test_capability_without_templates(capability: tuple[int, int]) -> None:
    with pytest.raises(UnknownArch, match=r"compute capability {}\.{}".format(*capability)):
        arch_for_capability(capability)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "", "SM_90A"])
def test_name_without_templates(name: str) -> None:
    with pytest.raises(UnknownArch) as caught:
        arch_spec(name)
    assert (caught.value.arch, caught.value.known) == (name, tuple(ARCHS))
    assert all(known in str(caught.value) for known in ARCHS)
    with pytest.raises(UnknownArch):
        MoeProblem(**{**BASE, "arch": name})
