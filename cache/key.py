"""What a compiled layer is a function of, as a record that hashes the same everywhere.

In: resolved facts only (the text that is compiled, the plan, the toolchain, the host's binary
interface). Never in: environment variables, absolute paths, times, the driver. Two keys share a
digest only if they are the same record; why, is said at `canonical`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, TypeAlias

from moejit.cache.errors import InvalidKey

__all__ = ["KEY_SCHEMA", "JsonValue", "KernelKey", "canonical", "why_different"]

# Raise it to orphan every older entry: when a field is added, or when the meaning of one changes.
KEY_SCHEMA = 1

JsonValue: TypeAlias = (
    "str | int | float | bool | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]{0,119}")  # name-<64 hex> stays under NAME_MAX = 255
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FLOAT = "$float"


@dataclass(frozen=True, kw_only=True, eq=False)
class KernelKey:
    """Identity of one compiled layer.

    Equality and hash follow the canonical JSON, not Python's ``==`` (for which ``True == 1``).

    Attributes:
        name: readable part of the entry's folder name; letters, digits, ``_`` and ``.``.
        source_sha256: digest of the rendered files of the layer.
        spec: problem and plan in clear text, for people and for `why_different`.
        kernel_names: symbols of the kernels, in launch order (ptxas output depends on them).
        arch: target, such as ``"sm_100a"``.
        options: every compile option, with its resolved value.
        dsl: ``"name==version"`` of each ``nvidia-cutlass-dsl*`` distribution; order is ignored.
        compiler_digest: size and sha256 of the compiler's shared object.
        tvm_ffi: ``"major.minor"`` of the calling convention's package.
        host: what the host code was built for: machine and CPU baseline.
        schema: `KEY_SCHEMA`.

    Raises:
        InvalidKey: a value is of another type, or has no unambiguous JSON form (NaN, a set,
            a mapping key that is not a string, a string that is not valid Unicode, ...).
    """

    name: str
    source_sha256: str
    spec: Mapping[str, JsonValue]
    kernel_names: tuple[str, ...]
    arch: str
    options: Mapping[str, JsonValue]
    dsl: tuple[str, ...]
    compiler_digest: str
    tvm_ffi: str
    host: Mapping[str, str]
    schema: int = KEY_SCHEMA

    def __post_init__(self) -> None:
        for field in ("name", "source_sha256", "arch", "compiler_digest", "tvm_ffi"):
            if type(getattr(self, field)) is not str or not getattr(self, field):
                raise InvalidKey(field, f"expected a text, got {getattr(self, field)!r}")
        if not _NAME.fullmatch(self.name):
            raise InvalidKey("name", f"{self.name!r} does not match {_NAME.pattern}")
        if not _SHA256.fullmatch(self.source_sha256):
            raise InvalidKey("source_sha256", f"{self.source_sha256!r} is not a sha256")
        if type(self.schema) is not int or self.schema < 1:
            raise InvalidKey("schema", f"expected a positive integer, got {self.schema!r}")
        for field in ("kernel_names", "dsl"):
            names = getattr(self, field)
            if not isinstance(names, (tuple, list)) or any(type(n) is not str for n in names):
                raise InvalidKey(field, f"expected a tuple of texts, got {names!r}")
        for field in ("spec", "options", "host"):
            if not isinstance(getattr(self, field), Mapping):
                raise InvalidKey(field, f"expected a mapping, got {getattr(self, field)!r}")
        if any(type(value) is not str for value in self.host.values()):
            raise InvalidKey("host", f"expected texts, got {dict(self.host)!r}")

        frozen: dict[str, Any] = {
            "spec": _freeze(self.spec, "spec"),
            "options": _freeze(self.options, "options"),
            "host": _freeze(self.host, "host"),
            "kernel_names": tuple(self.kernel_names),
            "dsl": tuple(sorted(self.dsl)),
        }
        for field, value in frozen.items():
            object.__setattr__(self, field, value)
        text = canonical({f.name: getattr(self, f.name) for f in fields(self)})
        object.__setattr__(self, "_json", text)
        object.__setattr__(self, "_digest", hashlib.sha256(text.encode()).hexdigest())

    def digest(self) -> str:
        """The sha256 of `to_json`, in hex."""
        digest: str = self.__dict__["_digest"]
        return digest

    def to_json(self) -> str:
        """The canonical JSON text; equal texts and equal keys are the same thing."""
        text: str = self.__dict__["_json"]
        return text

    @classmethod
    def from_json(cls, text: str) -> KernelKey:
        """The key that `to_json` wrote.

        Raises:
            InvalidKey: the text is not JSON, or not the record of a key.
        """
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise InvalidKey("json", f"not a JSON text ({exc})") from exc
        return cls.from_tree(tree)

    @classmethod
    def from_tree(cls, tree: object) -> KernelKey:
        """Like `from_json`, for a text that is parsed already."""
        expected = {f.name for f in fields(cls)}
        if not isinstance(tree, dict) or set(tree) != expected:
            found = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
            raise InvalidKey("json", f"expected the fields {sorted(expected)}, found {found}")
        decoded = {name: _decode(value, name) for name, value in tree.items()}
        return cls(**decoded)

    @property
    def entry_name(self) -> str:
        """Name of the entry's folder."""
        return f"{self.name}-{self.digest()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KernelKey) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return KernelKey.from_json, (self.to_json(),)  # the read-only mappings do not pickle


def canonical(value: JsonValue) -> str:
    """JSON text with one spelling per value and one value per spelling.

    Keys are sorted and nothing is escaped that need not be. A float is written as
    ``{"$float": <hex>}``: exact, and apart from both the integer and the text of the same look;
    mapping keys that start with ``$`` are refused to keep it so. Lone surrogates are refused, for
    an escaped pair of them would read like the one character that they encode.

    Raises:
        InvalidKey: the value has no such form.
    """
    return _dump(_freeze(value, "value"))


def why_different(a: KernelKey, b: KernelKey) -> list[str]:
    """Each fact in which two keys differ, as ``"spec.hidden: 7168 != 4096"``; empty if equal."""
    reasons: list[str] = []
    for field in fields(KernelKey):
        reasons += _differences(field.name, getattr(a, field.name), getattr(b, field.name))
    return reasons


def _differences(where: str, a: object, b: object) -> list[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        reasons = []
        for name in sorted({*a, *b}):
            if name not in a or name not in b:
                only, held = ("first", a[name]) if name in a else ("second", b[name])
                reasons.append(f"{where}.{name}: only in the {only} ({held!r})")
            else:
                reasons += _differences(f"{where}.{name}", a[name], b[name])
        return reasons
    if _dump(a) == _dump(b):  # not a == b, for which True is 1
        return []
    return [f"{where}: {_encode(a)!r} != {_encode(b)!r}"]


def _freeze(value: object, where: str) -> Any:
    """A deep read-only copy; subclasses are refused, for their text may not tell all of them."""
    if value is None or type(value) is bool:
        return value
    if type(value) is int:
        if value.bit_length() > 64:  # Python itself refuses to print or parse very long ones
            raise InvalidKey(where, "the integer does not fit 64 bits")
        return value
    if type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            raise InvalidKey(where, f"{value!r} is not valid Unicode") from exc
        return value
    if type(value) is float:
        if math.isnan(value):
            raise InvalidKey(where, "NaN differs from itself and cannot be part of a key")
        return value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return tuple(_freeze(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, Mapping):
        copy = {}
        for name, item in value.items():
            if type(name) is not str:
                raise InvalidKey(where, f"the mapping key {name!r} is not a text")
            if name.startswith("$"):
                raise InvalidKey(where, f"the mapping key {name!r} starts with $, which is taken")
            copy[_freeze(name, where)] = _freeze(item, f"{where}.{name}")
        return MappingProxyType(copy)
    raise InvalidKey(where, f"{value!r} ({type(value).__name__}) has no exact form in JSON")


def _dump(frozen: object) -> str:
    return json.dumps(_encode(frozen), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _encode(value: object) -> Any:
    if isinstance(value, float):
        return {_FLOAT: value.hex()}
    if isinstance(value, Mapping):
        return {name: _encode(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def _decode(value: object, where: str) -> Any:
    if isinstance(value, dict):
        if _FLOAT in value:
            try:
                (text,) = value.values()
                return float.fromhex(text)
            except (TypeError, ValueError, OverflowError) as exc:
                raise InvalidKey(where, f"{value!r} is not a float in hex") from exc
        return {name: _decode(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return tuple(_decode(item, where) for item in value)
    if isinstance(value, float):
        raise InvalidKey(where, f"the float {value!r} is not in hex")
    return value
