"""stub"""
from __future__ import annotations


def prewarm() -> None:
    """Demo."""
