"""`moejit prewarm`, `inspect` and `cache` on one small layer, compiled for real, with no GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moejit.codegen.problem import MoeProblem
from moejit.runtime import inspect as layers
from moejit.runtime.cubin import find_cubins, kernel_resources
from moejit.runtime.errors import NotKept
from moejit.runtime.prewarming import prewarm
from moejit.runtime.settings import scope

Run = Callable[..., Any]

SHAPE = ("--hidden", "128", "--intermediate", "64", "--top-k", "2", "--experts", "4")
ONE = (*SHAPE, "--tokens", "8", "--arch", "sm_90a", "--finalize", "fused")


def layers_problem() -> MoeProblem:
    """What `ONE` asks for."""
    return MoeProblem(
        arch="sm_90a",
        hidden=128,
        intermediate=64,
        top_k=2,
        num_experts=4,
        num_local_experts=4,
        tokens=8,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the one layer that `ONE` needs."""
    pytest.importorskip("cutlass", reason="compiles a layer")
    root = tmp_path_factory.mktemp("compiled")
    with scope(cache_dir=root, lock_dir=root / "locks", jit="auto", backend="auto", arch=None):
        report = prewarm([layers_problem()], jobs=1)
    assert report.ok, [str(outcome.error) for outcome in report.failed]
    return root


@pytest.fixture
def cache_dir(compiled: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of that cache, for this test to spoil; nothing may be compiled."""
    root = tmp_path / "cache"
    shutil.copytree(compiled, root)
    with scope(cache_dir=root, lock_dir=tmp_path / "locks", jit="error", backend="auto", arch=None):
        yield root


def key_of(moejit: Run) -> str:
    (record,) = json.loads(moejit("cache", "list", "--json").out)
    return str(record["key"])


# ---- prewarm


def test_prewarm_skips_what_is_there(moejit: Run) -> None:
    done = moejit("prewarm", *ONE, "--json")
    tree = json.loads(done.out)
    assert done.code == 0 and not tree["failures"]
    assert [layer["state"] for layer in tree["layers"]] == ["warm"]


def test_prewarm_builds_into_an_empty_cache_and_shares_layers(
    moejit: Run, cache_dir: Path, tmp_path: Path
) -> None:
    with scope(cache_dir=tmp_path / "empty", jit="auto"):
        done = moejit("prewarm", *SHAPE, "--tokens", "1-8", "--arch", "sm_90a", "-j", "1",
                      "--finalize", "fused")  # fmt: skip
        listed = json.loads(moejit("cache", "list", "--json").out)
    assert done.code == 0, done.err
    assert "4 shapes need 1 layers: 1 built" in done.out
    assert len(listed) == 1


def test_prewarm_reports_each_failure_and_goes_on(
    moejit: Run, cache_dir: Path, tmp_path: Path
) -> None:
    with scope(cache_dir=tmp_path / "empty", linker="no-such-linker"):
        done = moejit("prewarm", *ONE, "-j", "1")
    assert done.code == 1
    assert "failed: sm_90a" in done.err and "no-such-linker" in done.err
    assert "Traceback" not in done.err


def test_prewarm_fails_where_the_cache_cannot_keep_a_layer(
    moejit: Run, cache_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with scope(cache_dir=tmp_path / "file" / "cache", jit="auto"):
        done = moejit("prewarm", *ONE, "-j", "1")
        tree = json.loads(moejit("prewarm", *ONE, "-j", "1", "--json").out)
        report = prewarm([layers_problem()], jobs=1)
    assert done.code == 1 and "could not keep it" in done.err
    assert [layer["state"] for layer in tree["layers"]] == ["failed"] and tree["failures"]
    (lost,) = report.failed
    assert not report.ok and not report.built and isinstance(lost.error, NotKept)
    assert lost.error.reason and str(tmp_path) in str(lost.error)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param((), "needs --hidden", id="nothing"),
        pytest.param(SHAPE[:4], "needs --top-k, --experts", id="half_a_shape"),
        pytest.param((*SHAPE, "--shapes", "x.toml"), "one or the other", id="both"),
        pytest.param(("--shapes", "/no/such.toml"), "cannot be read", id="no_file"),
        pytest.param((*SHAPE, "--arch", "sm_80"), "sm_80", id="arch"),
        pytest.param((*SHAPE, "--tokens", "x"), "'x' is no token count", id="tokens"),
    ],
)
def test_prewarm_mistake_exits_with_2(moejit: Run, argv: tuple[str, ...], words: str) -> None:
    done = moejit("prewarm", *argv)
    assert done.code == 2 and words in done.err and not done.out


# ---- inspect


def test_inspect_by_key_and_by_shape_agree(moejit: Run) -> None:
    by_key = moejit("inspect", key_of(moejit)[:8], "--json")
    by_shape = moejit("inspect", *ONE, "--json")
    assert by_key.code == by_shape.code == 0
    assert json.loads(by_key.out) == json.loads(by_shape.out)


def test_inspect_shows_kernels_plan_and_files(moejit: Run) -> None:
    done = moejit("inspect", *ONE)
    for word in ("route", "gemm1", "gemm2", "No spills", "kernel.ptx", "sm_90a"):
        assert word in done.out


def test_inspect_source_is_what_was_compiled(moejit: Run) -> None:
    by_key = moejit("inspect", key_of(moejit)[:8], "--source")
    by_shape = moejit("inspect", *ONE, "--source")
    assert sorted(by_key.out.splitlines()) == sorted(by_shape.out.splitlines())
    one = moejit("inspect", *ONE, "--source", "--file", "gemm1.py").out
    assert one.startswith("# generated by moejit from templates/sm90/gemm1.py.j2")
    compile(one, "gemm1.py", "exec")


def test_inspect_ptx(moejit: Run) -> None:
    assert ".target sm_90a" in moejit("inspect", *ONE, "--ptx").out


def test_inspect_sass_or_says_what_to_install(moejit: Run) -> None:
    done = moejit("inspect", *ONE, "--sass")
    if layers.find_nvdisasm() is None:
        assert done.code == 2 and "moejit[sass]" in done.err
    else:
        assert done.code == 0 and "EXIT" in done.out


def test_inspect_sass_without_a_disassembler(moejit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "find_nvdisasm", lambda: None)
    done = moejit("inspect", *ONE, "--sass")
    assert done.code == 2 and "moejit[sass]" in done.err


def test_inspect_sass_with_a_disassembler_that_fails(
    moejit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "find_nvdisasm", lambda: Path("/bin/false"))
    done = moejit("inspect", *ONE, "--sass")
    assert done.code == 2 and "/bin/false failed" in done.err


def test_inspect_shared_memory_is_that_of_the_plan(moejit: Run) -> None:
    from moejit.codegen import select

    plan = select(layers_problem())
    facts = json.loads(moejit("inspect", *ONE, "--json").out)
    assert facts["dynamic_smem_bytes"] == {
        "gemm1": plan.gemm1.smem_bytes,
        "gemm2": plan.gemm2.smem_bytes,
    }
    foreign = {"plan": "sm90_x", "gemm1.token_tile": 8, "gemm1.stages": 2, "gemm1.new_field": 1}
    assert layers._dynamic_smem(foreign) == {}


def test_inspect_why_has_the_order_of_the_selection() -> None:
    from moejit.codegen import explain, select

    problem = layers_problem()
    assert layers.why(problem) == explain(problem)
    assert layers.why(problem)[0].plan == select(problem)


def test_inspect_why_lists_every_plan(moejit: Run) -> None:
    tree = json.loads(moejit("inspect", *SHAPE, "--why", "--arch", "sm_90a", "--json").out)
    assert tree["chosen"] == tree["plans"][0]["plan"] and len(tree["plans"]) > 1
    assert "chosen" in moejit("inspect", *SHAPE, "--why", "--arch", "sm_90a").out


def test_inspect_by_shape_of_a_layer_that_may_not_be_compiled(moejit: Run) -> None:
    done = moejit("inspect", *ONE[:-1], "deterministic")
    assert done.code == 2 and "moejit prewarm" in done.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param((), "needs the first characters of a key", id="nothing"),
        pytest.param(("zz",), "no layer in", id="no_such_key"),
        pytest.param(("h128", *SHAPE), "a key was given too", id="both"),
        pytest.param(("h128", "--why"), "needs a shape", id="why_of_a_key"),
        pytest.param(("h128", "--ptx", "--source"), "takes one of", id="two_views"),
        pytest.param(("h128", "--file", "a"), "goes with --source", id="file_alone"),
        pytest.param(("h128", "--source", "--file", "a"), "there is no 'a'", id="no_such_file"),
        pytest.param((*ONE, "--finalize", "both"), "fused or deterministic", id="finalize"),
        pytest.param((*ONE, "--tokens", "-1"), "'-1' is no token count", id="tokens"),
    ],
)
def test_inspect_mistake_exits_with_2(moejit: Run, argv: tuple[str, ...], words: str) -> None:
    done = moejit("inspect", *argv)
    assert done.code == 2 and words in done.err and not done.out


def test_layer_in_two_roots_is_one_layer(moejit: Run, cache_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(cache_dir, copy)
    key = key_of(moejit)
    with scope(read_only_cache_dirs=(copy,)):
        done = moejit("inspect", key[:8], "--json")
        listed = moejit("cache", "list").out
    assert done.code == 0 and json.loads(done.out)["key"] == key
    assert str(copy) in listed and len(listed.split(key[:10])) == 3


def test_mistake_with_json_is_json(moejit: Run) -> None:
    done = moejit("inspect", "zzz", "--json")
    error = json.loads(done.out)["error"]
    assert done.code == 2 and error["type"] == "NoSuchLayer" and error["message"] in done.err


def test_ambiguous_key_lists_the_matches() -> None:
    text = str(layers.AmbiguousKey("h", ["aaa", "bbb"]))
    assert text.splitlines() == ["2 layers match 'h'; say more:", "  aaa", "  bbb"]


# ---- resources


def test_resources_come_from_the_library(compiled: Path) -> None:
    (library,) = compiled.glob("entries/*/*/kernel.so")
    kernels = kernel_resources(library.read_bytes())
    assert {"route", "gemm1", "gemm2"} <= {k.name.rsplit("_", 2)[-2] for k in kernels}
    assert all(0 < k.registers <= 255 and k.code_bytes and not k.stack_bytes for k in kernels)
    assert all(k.threads % 32 == 0 for k in kernels)


def test_cubin_found_in_a_library_is_whole(compiled: Path) -> None:
    (library,) = compiled.glob("entries/*/*/kernel.so")
    (cubin,) = find_cubins(library.read_bytes())
    assert find_cubins(b"before" + cubin + b"after") == [cubin]
    assert kernel_resources(cubin) == kernel_resources(library.read_bytes())


def test_bytes_without_a_cubin_have_no_kernels() -> None:
    assert kernel_resources(b"\x7fELF" + bytes(100)) == []


# ---- cache


def test_cache_list(moejit: Run, cache_dir: Path) -> None:
    done = moejit("cache", "list")
    assert done.code == 0 and "1 layers" in done.out and str(cache_dir) in done.out


def test_cache_path(moejit: Run, cache_dir: Path) -> None:
    assert moejit("cache", "path").out == f"{cache_dir}\n"


def test_cache_verify_finds_a_flipped_byte(moejit: Run, cache_dir: Path) -> None:
    assert moejit("cache", "verify").code == 0
    (library,) = cache_dir.glob("entries/*/*/kernel.so")
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.write_bytes(data)
    done = moejit("cache", "verify")
    assert done.code == 1 and "kernel.so" in done.err
    (verdict,) = json.loads(moejit("cache", "verify", "--json").out)
    assert verdict["problems"]


def test_cache_clear(moejit: Run, cache_dir: Path) -> None:
    done = moejit("cache", "clear", "--yes")
    assert done.code == 0 and "Removed 1 layers" in done.out
    assert json.loads(moejit("cache", "list", "--json").out) == []
    assert moejit("cache", "clear").code == 0  # nothing to ask about


def test_cache_clear_without_an_answer_removes_nothing(
    moejit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert moejit("cache", "clear").code != 0
    assert len(json.loads(moejit("cache", "list", "--json").out)) == 1


def test_empty_cache_says_how_to_fill_it(moejit: Run, tmp_path: Path) -> None:
    with scope(cache_dir=tmp_path / "none"):
        done = moejit("cache", "list")
    assert done.code == 0 and "moejit prewarm" in done.err
    assert not (tmp_path / "none").exists()


def test_cache_clear_leaves_read_only_roots_alone(
    moejit: Run, cache_dir: Path, tmp_path: Path
) -> None:
    with scope(cache_dir=tmp_path / "mine", read_only_cache_dirs=(cache_dir,)):
        assert len(json.loads(moejit("cache", "list", "--json").out)) == 1
        assert moejit("cache", "clear", "--yes").code == 0
        assert len(json.loads(moejit("cache", "list", "--json").out)) == 1
