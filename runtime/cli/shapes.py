"""Shapes on the command line and in TOML files: text in, lists of `MoeProblem` out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from moejit.codegen.errors import BadProblem, MoejitError, UnknownArch
from moejit.codegen.problem import MoeProblem

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["BadShape", "LayerShape", "expand_tokens", "problems_of", "read_shapes", "split_list"]

OUTPUT_DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
}
FINALIZE = {"fused": (False,), "deterministic": (True,), "both": (False, True)}


class BadShape(MoejitError, ValueError):
    """A shape option or a field of a shapes file cannot be used.

    Attributes:
        where: the option, or the file and the field.
        problem: what is wrong, and what would be right.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(where, problem)
        self.where, self.problem = where, problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One MoE layer of a deployment, as options and shapes files name its fields."""

    hidden: int
    intermediate: int
    top_k: int
    experts: int
    local_experts: int | None = None
    tokens: str = "1-8192"
    arch: Sequence[str] = field(default_factory=tuple)
    output_dtype: str = "bfloat16"
    ids_dtype: str = "int32"
    scales_dtype: str = "float32"
    finalize: str = "both"
    pdl: bool = True
    name: str = ""  # for messages


def split_list(text: str) -> list[str]:
    """``"a, b"`` -> ``["a", "b"]``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def expand_tokens(text: str, where: str = "--tokens") -> list[int]:
    """Token counts: ``1,7,64`` as they are, ``1-8192`` at its powers of two and its ends."""
    counts: set[int] = set()
    for part in split_list(text):
        low, dash, high = part.partition("-")
        if not low.strip().isdigit() or (dash and not high.strip().isdigit()):
            raise BadShape(where, f"{part!r} is no token count; write 64, 1-8192, or 1,8,64-512")
        first, last = int(low), int(high) if dash else int(low)
        if first > last:
            raise BadShape(where, f"the range {part!r} ends before it begins")
        counts |= {first, last}
        counts |= {1 << n for n in range(last.bit_length()) if first <= 1 << n <= last}
    if not counts:
        raise BadShape(where, "names no token count; write 64, 1-8192, or 1,8,64-512")
    return sorted(counts)


def read_shapes(path: Path) -> list[LayerShape]:
    """The layers of a shapes file; top-level keys are defaults for every ``[[layer]]``."""
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except OSError as exc:
        raise BadShape(str(path), f"cannot be read: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise BadShape(str(path), f"is not TOML: {exc}") from exc
    layers = tree.pop("layer", None)
    if not isinstance(layers, list) or not layers:
        raise BadShape(str(path), "has no [[layer]] table")
    return [_layer(f"{path}, layer {i}", {**tree, **one}) for i, one in enumerate(layers, 1)]


def problems_of(
    shape: LayerShape, default_archs: Sequence[str], only: Sequence[str] = ()
) -> list[MoeProblem]:
    """Every problem a deployment of the layer can ask for.

    Args:
        shape: the layer.
        default_archs: targets for a layer that names none.
        only: targets that replace those of the layer.
    """
    where = shape.name or "shape"
    if shape.output_dtype not in OUTPUT_DTYPES:
        known = ", ".join(OUTPUT_DTYPES)
        raise BadShape(where, f"output_dtype is {shape.output_dtype!r}; it must be one of {known}")
    if shape.finalize not in FINALIZE:
        known = ", ".join(FINALIZE)
        raise BadShape(where, f"finalize is {shape.finalize!r}; it must be one of {known}")
    local = shape.local_experts
    try:
        return [
            MoeProblem(
                arch=arch,
                hidden=shape.hidden,
                intermediate=shape.intermediate,
                top_k=shape.top_k,
                num_experts=shape.experts,
                num_local_experts=shape.experts if local is None else local,
                tokens=tokens,
                ids_dtype=shape.ids_dtype,
                scales_dtype=shape.scales_dtype,
                output_dtype=OUTPUT_DTYPES[shape.output_dtype],
                deterministic=deterministic,
                pdl=shape.pdl,
            )
            for arch in only or shape.arch or default_archs
            for deterministic in FINALIZE[shape.finalize]
            for tokens in expand_tokens(shape.tokens, f"{where}: tokens")
        ]
    except (BadProblem, UnknownArch) as exc:
        raise BadShape(where, str(exc)) from exc


_TYPES: dict[str, type] = {
    "hidden": int,
    "intermediate": int,
    "top_k": int,
    "experts": int,
    "local_experts": int,
    "pdl": bool,
}


def _layer(where: str, tree: Mapping[str, Any]) -> LayerShape:
    known = [f.name for f in fields(LayerShape)]
    if unknown := sorted(set(tree) - set(known)):
        raise BadShape(where, f"unknown field {unknown[0]!r}; known: {', '.join(known)}")
    if missing := [n for n in ("hidden", "intermediate", "top_k", "experts") if n not in tree]:
        raise BadShape(where, f"{missing[0]} is missing")
    made = dict(tree)
    made["arch"] = _texts(where, "arch", tree.get("arch", ()))
    if not isinstance(made.get("tokens", ""), str):
        counts = made["tokens"] if isinstance(made["tokens"], list) else [made["tokens"]]
        made["tokens"] = ",".join(str(c) for c in counts)
    for name, value in made.items():
        kind = _TYPES.get(name, str)
        if name != "arch" and type(value) is not kind:
            raise BadShape(where, f"{name} is {value!r}; it must be {_KIND_NAMES[kind]}")
    made["name"] = f"{where} ({made['name']})" if made.get("name") else where
    return LayerShape(**made)


_KIND_NAMES = {int: "an integer", bool: "true or false", str: "a text"}


def _texts(where: str, name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(split_list(value))
    if isinstance(value, Iterable) and all(isinstance(item, str) for item in value):
        return tuple(str(item) for item in value)
    raise BadShape(where, f"{name} is {value!r}; it must be a text or a list of texts")
