"""The option that rewrites the expected sources: `pytest tests/golden --update-golden`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite tests/golden/expected from what is rendered now",
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    # pytest knows the option only where this folder is named on the command line.
    return bool(request.config.getoption("--update-golden", default=False))
