"""Work, counted instead of timed: how often functions are called does not depend on the machine or its load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def calls(function: Callable[[], Any]) -> int:
    """How many functions (of Python and of C) are called while ``function`` runs, for the second time."""
    function()
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def assert_linear(small: int, large: int, factor: float) -> None:
    """``factor`` times the size asks for at most ``factor ** 1.15`` times the work."""
    assert large <= small * factor**1.15, f"{small:,} calls, and {large:,} at {factor} times the size"
