"""Tests here launch kernels: they need a GPU that there are templates for, and skip without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moejit.codegen.arch import ARCHS
from moejit.runtime.settings import Settings, scope

HERE = Path(__file__).parent


def _why_no_gpu() -> str:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability not in {spec.capability for spec in ARCHS.values()}:
        return f"no kernels for compute capability {capability}"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := _why_no_gpu():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def layers_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that all tests here share, so that each layer is compiled once."""
    return tmp_path_factory.mktemp("layers")


@pytest.fixture(autouse=True)
def cuda_settings(layers_dir: Path) -> Iterator[Settings]:
    with scope(backend="auto", arch=None, jit="auto", cache_dir=layers_dir) as settings:
        yield settings
