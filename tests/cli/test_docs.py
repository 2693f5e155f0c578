"""What the pages show works: the Python runs, commands exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
IDS = [str(page.relative_to(REPO)) for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_python_on_the_page_runs(name: str, cache_dir: Path) -> None:
    code = "\n".join(blocks(REPO / name, "python"))
    given: dict[str, Any] = {}
    exec(compile(code, name, "exec"), given)
    assert list(given["out"].shape) == [16, 512]
    assert bool(given["out"].isfinite().all()) and float(given["out"].abs().max()) > 0


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_on_the_page_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_on_the_page_have_the_options_that_are_shown(page: Path, moejit: Run) -> None:
    shown = [line for text in blocks(page, "") for line in text.splitlines()]
    for line in shown:
        words = shlex.split(line, comments=True)
        if words[:1] != ["moejit"]:
            continue
        names = [
            word for word in words[1:3] if word in ("cache", "list", "verify", "clear", "path")
        ]
        command = words[1:2] if words[1] != "cache" else names
        usage = moejit(*command, "--help").out
        for option in (word for word in words if word.startswith("-")):
            assert option in usage, f"{line}: no {option}"
