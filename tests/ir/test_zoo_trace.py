"""Every zoo model traces, and the program equals the module at the traced sizes and at two that tracing did not see."""

from __future__ import annotations

import pytest
import torch

from graphlathe.ir.verify import relative_error, verify
from graphlathe.tools import zoo
from tests.zoo_programs import SAMPLE, flat_outputs, module, over_zoo, traced


@over_zoo(quick=SAMPLE)
def test_equals_the_module(name: str) -> None:
    """Traced, well formed at level 2, and equal at three sizes (design: 1e-5 relative in float32)."""
    model, program = zoo.get(name), traced(name)
    verify(program, 2)
    sizes = (model.trace_sizes, *model.unseen_sizes) if model.dynamic else (model.trace_sizes,)
    for at in sizes:
        inputs = model.inputs(at)
        outputs = program(**inputs)
        values = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs.values())
        with torch.no_grad():
            expected = flat_outputs(module(name)(**inputs))
        assert len(values) == len(expected)
        error = relative_error(dict(enumerate(values)), dict(enumerate(expected)))
        assert error <= 1e-5, f"at {dict(at)}: {error}"


@over_zoo(quick=SAMPLE)
def test_dynamic_dimensions_keep_their_names(name: str) -> None:
    """What the zoo declares dynamic is dynamic in the program, under the same name."""
    model, program = zoo.get(name), traced(name)
    specs = {spec.name: spec for spec in program.inputs}
    for port, axes in model.dynamic.items():
        for axis, dim in axes.items():
            assert program.main.dims.format(specs[port].shape[axis]) == dim


def test_the_zoo_is_large_enough() -> None:
    """At least forty architectures of transformers, as the project promises."""
    assert sum(m.family != "plain" for m in zoo.ZOO) >= 40
    assert set(SAMPLE) <= set(zoo.names()), set(SAMPLE) - set(zoo.names())


@pytest.mark.parametrize("name", [pytest.param("mamba2", marks=pytest.mark.xdist_group("mamba2"))])
def test_size_guards_refuse_what_tracing_excluded(name: str) -> None:
    """A chunked state-space model runs, and lies, at lengths on the other side of its chunking; we refuse them."""
    program = traced(name)
    sizes = dict(zoo.get(name).trace_sizes)
    refused = []
    for length in range(1, 2 * sizes["S"], 3):
        inputs = zoo.get(name).inputs({**sizes, "S": length})
        try:
            outputs = program(**inputs)
        except Exception as error:
            assert "outside what tracing assumed" in str(error) or "dimension S is" in str(error), error
            refused.append(length)
            continue
        with torch.no_grad():
            expected = module(name)(**inputs)
        assert relative_error(outputs, dict(zip(outputs, flat_outputs(expected), strict=True))) <= 1e-5
    assert refused, "this model was chosen because some lengths are excluded"
