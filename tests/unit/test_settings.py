"""Settings: what each variable does, what is refused, and how a test changes them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from moejit.runtime.settings import BadSetting, Settings, on_change, scope, settings

HOME = {"HOME": "/home/someone"}


def test_defaults_need_no_variable() -> None:
    found = Settings.from_env(HOME)
    assert (found.backend, found.jit, found.arch, found.linker) == ("auto", "auto", None, None)
    assert found.cache_dir == Path("/home/someone/.cache/moejit")
    assert found.dsl_overrides == ()


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("MOEJIT_BACKEND", "null", "backend", "null"),
        ("MOEJIT_ARCH", "sm_103a", "arch", "sm_103a"),
        ("MOEJIT_JIT", "error", "jit", "error"),
        ("MOEJIT_CACHE_DIR", "/a", "cache_dir", Path("/a")),
        ("XDG_CACHE_HOME", "/x", "cache_dir", Path("/x/moejit")),
        ("MOEJIT_LOCK_TIMEOUT_S", "2.5", "lock_timeout_s", 2.5),
        ("CC", "ccache gcc", "linker", "ccache gcc"),
    ],
)
def test_variable_sets_its_field(variable: str, value: str, field: str, expected: object) -> None:
    assert getattr(Settings.from_env({**HOME, variable: value}), field) == expected


def test_empty_variable_counts_as_unset() -> None:
    empty = dict.fromkeys(("MOEJIT_BACKEND", "MOEJIT_ARCH", "MOEJIT_JIT", "CC"), " ")
    assert Settings.from_env({**HOME, **empty}) == Settings.from_env(HOME)


def test_cache_dir_holds_one_root_to_write_and_more_to_read() -> None:
    found = Settings.from_env({**HOME, "MOEJIT_CACHE_DIR": "/rw:/image:/share"})
    assert found.cache_dir == Path("/rw")
    assert found.read_only_cache_dirs == (Path("/image"), Path("/share"))


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("MOEJIT_BACKEND", "gpu", "auto, cuda, reference, emulator, null"),
        ("MOEJIT_ARCH", "sm_80", "sm_90a"),
        ("MOEJIT_JIT", "on", "auto, off, error"),
        ("MOEJIT_LOCK_TIMEOUT_S", "soon", "seconds"),
        ("MOEJIT_LOCK_TIMEOUT_S", "-1", "seconds"),
        ("MOEJIT_LOCK_TIMEOUT_S", "nan", "seconds"),
        ("MOEJIT_CACHE_DIR", ":", "folders"),
    ],
)
def test_bad_value_names_variable_value_and_choices(variable: str, value: str, says: str) -> None:
    with pytest.raises(BadSetting) as caught:
        Settings.from_env({**HOME, variable: value})
    text = str(caught.value)
    assert variable in text and says in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


@pytest.mark.parametrize(
    ("variable", "value", "refused"),
    [
        ("CUTE_DSL_LINEINFO", "1", True),
        ("CUTE_DSL_LINEINFO", "0", False),
        ("CUTE_DSL_COMPILER_OPT", "opt-level=0", True),
        ("CUTE_DSL_TOLERATE_M2M", "True", False),
        ("CUTE_DSL_TOLERATE_M2M", "0", True),
        ("CUTE_DSL_ARCH", "sm_90a", False),
    ],
)
def test_dsl_variables_that_change_code_are_noticed(
    variable: str, value: str, refused: bool
) -> None:
    found = Settings.from_env({**HOME, variable: value})
    assert found.dsl_overrides == ((f"{variable}={value}",) if refused else ())


def test_describe_says_where_each_value_came_from() -> None:
    described = Settings.from_env({**HOME, "MOEJIT_JIT": "off"}).describe()
    by_name = {item.name: item for item in described}
    assert by_name["jit"].source == "MOEJIT_JIT" and by_name["jit"].value == "off"
    assert by_name["backend"].source == "default"
    assert all(item.meaning for item in described)


def test_scope_changes_settings_and_restores_them() -> None:
    before = settings()
    told = []
    on_change(lambda: told.append(1))
    with scope(backend="null", arch="sm_90a") as changed:
        assert settings() is changed
        assert changed.backend == "null"
    assert settings() is before
    assert len(told) == 2


def test_scope_refuses_a_bad_value_and_leaves_settings_alone() -> None:
    before = settings()
    with pytest.raises(BadSetting), scope(jit="maybe"):
        pass
    assert settings() is before


def test_values_rebuild_the_settings_in_another_process() -> None:
    found = Settings.from_env({**HOME, "MOEJIT_JIT": "off"})
    assert Settings(**pickle.loads(pickle.dumps(found.values()))) == found
