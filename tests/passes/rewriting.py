"""What every test of a rewriting pass does: parse, run, verify, compare numerically, run again."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch

from graphlathe.ir.program import Program
from graphlathe.ir.text import parse_program
from graphlathe.ir.verify import TOLERANCE, output_error, verify
from graphlathe.passes.base import Context, Pass, Stats

SIZES = ({"B": 2, "S": 5}, {"B": 3, "S": 1}, {"B": 1, "S": 7})


def feeds(program: Program, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Random inputs of the program's types, at the given sizes of its dimensions."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(sorted(sizes.items())).encode()))
    made: dict[str, Any] = {}
    for spec in program.inputs:
        shape = [program.main.dims.evaluate(size, sizes) for size in spec.shape]
        assert spec.dtype is not None
        if spec.dtype.is_floating_point:
            made[spec.name] = torch.randn(shape, generator=generator).to(spec.dtype)
        else:
            made[spec.name] = torch.randint(0, 2, shape, generator=generator).to(spec.dtype)
    return made


def assert_same_outputs(program: Program, before: Program) -> None:
    """Both programs answer alike at sizes of which tracing saw at most one."""
    for sizes in SIZES:
        inputs = feeds(before, sizes)
        expected, actual = before.run(inputs), program.run(inputs)
        assert list(actual) == list(expected)
        for name, want in expected.items():
            assert output_error(actual[name], want) <= TOLERANCE.get(want.dtype, 0.0), name


def rewritten(pass_: Pass, text: str) -> tuple[Program, Program, Stats]:
    """Run a pass over a program given as text, and hold it to what every exact rewrite must keep.

    Returns:
        The program before, the program after, and what the pass said.
    """
    before = parse_program(text)
    after = before.clone()
    stats = pass_.run(after, Context())
    verify(after, 2, pass_name=pass_.name)
    assert_same_outputs(after, before)
    again = after.clone()
    pass_.run(again, Context())
    assert again.mutations == 0, f"not idempotent: {again.to_text()}"
    assert bool(after.mutations) == (after.to_text() != before.to_text())
    return before, after, stats


def operators(program: Program) -> list[str]:
    """The operators of the main graph, in order."""
    return [
        str(n.target).removeprefix("aten.").removesuffix(".default")
        if isinstance(n.target, torch._ops.OpOverload)
        else n.target.__name__
        for n in program.graph.nodes
        if n.op == "call_function"
    ]
