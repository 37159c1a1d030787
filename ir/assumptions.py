"""What is assumed about sizes while something is tried out, and forgotten afterwards.

All programs that came from one trace share the environment that owns their symbols. A decomposition that asks ``is H
a multiple of 3?`` is answered by the example and leaves a guard there; were it kept, the next export would find the
question settled and no longer say that it was asked.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .dims import Guard

_STATE = (
    "guards",
    "axioms",
    "replacements",
    "replacements_slocs",
    "divisible",
    "var_to_range",
    "var_to_range_sloc",
    "specialization_stacks",
)


@contextmanager
def assumptions(env: ShapeEnv | None) -> Generator[list[Guard]]:
    """Collect the guards that the body leaves behind, and put the environment back as it was.

    Args:
        env: the symbols' environment; None collects nothing.

    Yields:
        A list that holds the guards once the body has ended.
    """
    found: list[Guard] = []
    if env is None:
        yield found
        return
    inner: Any = env
    saved = {name: getattr(inner, name).copy() for name in _STATE}
    try:
        yield found
    finally:
        known = len(saved["guards"])
        found += [Guard(guard.expr) for guard in inner.guards[known:] if guard.expr.free_symbols]
        if found or inner.replacements != saved["replacements"]:
            for name, value in saved.items():
                setattr(inner, name, value)
            # Everything that was remembered about expressions is void. Older versions of torch lack this counter.
            inner._replacements_version_counter = getattr(inner, "_replacements_version_counter", 0) + 1
            inner._version_counter += 1
            inner._prev_cache_key = inner._get_key()
            inner._resimplify_floor_div_axioms = True
            for method in vars(ShapeEnv).values():
                getattr(method, "cache_clear", _nothing)()


def _nothing() -> None:
    """For methods that remember nothing."""
