"""What a kernel key tells apart, what it does not, and what it refuses."""

from __future__ import annotations

import enum
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from concurrency.worker import KEY, make_key
from hypothesis import given, settings
from hypothesis import strategies as st

from moejit.cache import InvalidKey, KernelKey, canonical, why_different


def spec(**changes: Any) -> dict[str, Any]:
    return {"spec": {**KEY["spec"], **changes}}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"name": "moe_h7168_i2048_k9"}, id="name"),
        pytest.param({"source_sha256": "6" * 64}, id="source"),
        pytest.param({"arch": "sm_103a"}, id="arch"),
        pytest.param({"kernel_names": ("moejit_gemm1", "moejit_gemm3")}, id="kernel_name"),
        pytest.param({"kernel_names": ("moejit_gemm2", "moejit_gemm1")}, id="kernel_order"),
        pytest.param({"kernel_names": ("moejit_gemm1moejit_gemm2",)}, id="names_joined"),
        pytest.param({"kernel_names": ("moejit_gemm", "1moejit_gemm2")}, id="names_cut_elsewhere"),
        pytest.param({"kernel_names": ('moejit_gemm1","moejit_gemm2',)}, id="names_with_quotes"),
        pytest.param({"options": {"opt_level": 2, "lineinfo": False}}, id="option"),
        pytest.param({"options": {"opt_level": 3}}, id="option_left_out"),
        pytest.param({"dsl": ("nvidia-cutlass-dsl==4.8.1",)}, id="dsl_flavour"),
        pytest.param({"dsl": ("nvidia-cutlass-dsl==4.8.2", KEY["dsl"][1])}, id="dsl_version"),
        pytest.param({"compiler_digest": "191551984:" + "e" * 64}, id="compiler"),
        pytest.param({"compiler_digest": "unprobed: no compiler"}, id="compiler_unknown"),
        pytest.param({"tvm_ffi": "0.2"}, id="tvm_ffi"),
        pytest.param({"host": {**KEY["host"], "cpu": "x86-64-v4"}}, id="cpu"),
        pytest.param({"host": {**KEY["host"], "machine": "aarch64"}}, id="machine"),
        pytest.param({"host": {**KEY["host"], "libc": "glibc 2.28"}}, id="libc"),
        pytest.param({"schema": 2}, id="schema"),
        pytest.param(spec(hidden=7169), id="spec_int"),
        pytest.param(spec(clamp=math.nextafter(1.5, 2)), id="spec_float_one_ulp"),
        pytest.param(spec(clamp="0x1.8000000000000p+0"), id="spec_float_as_hex_text"),
        pytest.param(spec(top_k="8"), id="spec_int_as_text"),
        pytest.param(spec(top_k=8.0), id="spec_int_as_float"),
        pytest.param(spec(pdl=1), id="spec_true_as_one"),
        pytest.param(spec(pdl=None), id="spec_none"),
        pytest.param(spec(tile=[256, 128]), id="spec_list_order"),
        pytest.param(spec(tile=[[128], 256]), id="spec_list_nesting"),
        pytest.param(spec(extra=None), id="spec_extra_field"),
        pytest.param({"spec": {}, "options": KEY["spec"]}, id="spec_moved_to_options"),
    ],
)
def test_digest_changes_with(change: dict[str, Any]) -> None:
    assert make_key(**change).digest() != make_key().digest()
    assert make_key(**change) != make_key()
    assert why_different(make_key(), make_key(**change))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"spec": dict(reversed(KEY["spec"].items()))}, id="spec_order"),
        pytest.param({"options": dict(reversed(KEY["options"].items()))}, id="options_order"),
        pytest.param({"dsl": tuple(reversed(KEY["dsl"]))}, id="dsl_order"),
        pytest.param({"dsl": list(KEY["dsl"])}, id="dsl_as_list"),
        pytest.param({"spec": MappingProxyType(KEY["spec"])}, id="spec_as_other_mapping"),
        pytest.param(spec(tile=(128, 256)), id="tuple_for_list"),
    ],
)
def test_digest_does_not_change_with(change: dict[str, Any]) -> None:
    assert make_key(**change).digest() == make_key().digest()
    assert make_key(**change) == make_key()
    assert hash(make_key(**change)) == hash(make_key())
    assert why_different(make_key(), make_key(**change)) == []


# Every entry on users' disks hangs on this text: if it has to change, KEY_SCHEMA goes up.
PINNED = "25ba0dfb711e14e9afbf0f08cc088a695182f6a41fe892cd5156240c2a96f546"


def test_digest_is_that_of_the_first_release() -> None:
    assert make_key().digest() == PINNED


@pytest.mark.parametrize(
    "env",
    [{"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "CUTE_DSL_ARCH": "sm_90a", "LANG": "C"}],
)
def test_digest_is_the_same_in_another_process_folder_and_environment(
    env: dict[str, str], tmp_path: Path
) -> None:
    tests = str(Path(__file__).parents[1])
    code = (
        f"import sys; sys.path.append({tests!r}); from concurrency.worker import make_key; "
        "print(make_key().digest())"
    )
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
    out = subprocess.check_output(
        [sys.executable, "-c", code], cwd=tmp_path, env={**env, "PYTHONPATH": path}, text=True
    )
    assert out.strip() == make_key().digest()


class Finalize(str, enum.Enum):
    ATOMIC = "atomic"


def deep() -> dict[str, Any]:
    class Shape(tuple[int, ...]):
        _fields = ("m", "n")

    return {"shape": Shape((1, 2))}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        pytest.param(spec(clamp=math.nan), "spec.clamp", id="nan"),
        pytest.param({"spec": {1: 2}}, "spec", id="key_not_text"),
        pytest.param({"spec": {"a": {None: 2}}}, "spec.a", id="inner_key_not_text"),
        pytest.param({"spec": {"$float": "0x1p+0"}}, "spec", id="reserved_key"),
        pytest.param(spec(tiles={128, 256}), "spec.tiles", id="set"),
        pytest.param(spec(text=b"bytes"), "spec.text", id="bytes"),
        pytest.param(spec(path=Path("/tmp")), "spec.path", id="object"),
        pytest.param(spec(mode=Finalize.ATOMIC), "spec.mode", id="enum"),
        pytest.param({"spec": deep()}, "spec.shape", id="namedtuple"),
        pytest.param(spec(text="\ud83d\ude00"), "spec.text", id="surrogates"),
        pytest.param(spec(number=1 << 64), "spec.number", id="number_too_long"),
        pytest.param({"spec": [("a", 1)]}, "spec", id="spec_not_a_mapping"),
        pytest.param({"host": {"cpu": 3}}, "host", id="host_not_text"),
        pytest.param({"arch": ""}, "arch", id="arch_empty"),
        pytest.param({"arch": 90}, "arch", id="arch_not_text"),
        pytest.param({"source_sha256": "abc"}, "source_sha256", id="short_sha"),
        pytest.param({"kernel_names": "moejit_gemm1"}, "kernel_names", id="names_one_text"),
        pytest.param({"kernel_names": ("a", 1)}, "kernel_names", id="name_not_text"),
        pytest.param({"name": "../evil"}, "name", id="name_with_slash"),
        pytest.param({"name": ".."}, "name", id="name_of_dots"),
        pytest.param({"name": "x" * 121}, "name", id="name_too_long"),
        pytest.param({"schema": True}, "schema", id="schema_bool"),
    ],
)
def test_refuses_what_has_no_unambiguous_form(change: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidKey) as caught:
        make_key(**change)
    assert caught.value.where.startswith(where)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_survives_json_pickle_and_later_edits_of_its_arguments() -> None:
    options = {"opt_level": 3, "flags": ["-a"]}
    key = make_key(options=options)
    digest = key.digest()
    options["opt_level"] = 2
    options["flags"].append("-b")  # type: ignore[attr-defined]
    assert key.options == {"opt_level": 3, "flags": ("-a",)}
    for copy in (KernelKey.from_json(key.to_json()), pickle.loads(pickle.dumps(key))):
        assert copy == key
        assert copy.digest() == digest
        assert copy.spec == key.spec
        assert copy.spec["clamp"] == 1.5


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x"}', "[" * 100_000, "null"])
def test_from_json_refuses_other_texts(text: str) -> None:
    with pytest.raises(InvalidKey):
        KernelKey.from_json(text)


def test_from_json_refuses_a_float_that_is_not_in_hex() -> None:
    text = make_key().to_json().replace('"hidden":7168', '"hidden":7168.5')
    with pytest.raises(InvalidKey, match="hex"):
        KernelKey.from_json(text)


def test_why_different_names_each_fact() -> None:
    other = make_key(arch="sm_90a", spec={**KEY["spec"], "hidden": 4096, "new": 1}, tvm_ffi="0.2")
    assert why_different(make_key(), other) == [
        "spec.hidden: 7168 != 4096",
        "spec.new: only in the second (1)",
        "arch: 'sm_100a' != 'sm_90a'",
        "tvm_ffi: '0.1' != '0.2'",
    ]


# A small alphabet, so that two random values are equal, or look alike, often enough.
TEXTS = st.text(alphabet='a1:,"[]{}\\\u0000\u00e9\U0001f600', max_size=3)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-1, 1)
    | st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, 5e-324])
    | st.floats(allow_nan=False)
    | TEXTS
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=6
)
SPECS = st.dictionaries(TEXTS, VALUES, max_size=3)


def same(a: Any, b: Any) -> bool:
    """Equal in type and value all the way down, told without any JSON."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    return bool(a == b)


def thaw(value: Any) -> Any:
    if isinstance(value, MappingProxyType):
        return {k: thaw(v) for k, v in value.items()}
    return [thaw(v) for v in value] if isinstance(value, tuple) else value


@settings(max_examples=400, deadline=None)
@given(a=SPECS, b=SPECS)
def test_two_specs_share_a_digest_only_if_they_are_the_same(a: Any, b: Any) -> None:
    key_a, key_b = make_key(spec=a), make_key(spec=b)
    assert (key_a.digest() == key_b.digest()) is same(a, b)
    assert (key_a.to_json() == key_b.to_json()) is same(a, b)
    assert (why_different(key_a, key_b) == []) is same(a, b)


@settings(max_examples=300, deadline=None)
@given(a=VALUES, b=VALUES)
def test_two_values_share_a_text_only_if_they_are_the_same(a: Any, b: Any) -> None:
    assert (canonical(a) == canonical(b)) is same(a, b)


@settings(max_examples=300, deadline=None)
@given(value=SPECS)
def test_a_spec_comes_back_from_json_as_it_was(value: Any) -> None:
    key = make_key(spec=value)
    again = KernelKey.from_json(key.to_json())
    assert same(thaw(again.spec), value)
    assert again.to_json() == key.to_json()


@settings(max_examples=200, deadline=None)
@given(a=st.lists(TEXTS, max_size=3), b=st.lists(TEXTS, max_size=3))
def test_kernel_names_are_told_apart_whatever_is_in_them(a: list[str], b: list[str]) -> None:
    assert (make_key(kernel_names=tuple(a)) == make_key(kernel_names=tuple(b))) is (a == b)
