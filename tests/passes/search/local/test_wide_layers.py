"""Layers too wide for float64 (here: over six columns) give in float32 what others give in float64, up to rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphlathe.passes.search.local import damping
from graphlathe.passes.search.local.columns import condition, optimal_compensation_scores
from graphlathe.passes.search.local.factorize import factorize
from graphlathe.passes.search.local.gptq import gptq
from graphlathe.passes.search.local.obs import remove_groups
from graphlathe.passes.search.local.sparsegpt import sparsegpt, wanda_sparse
from tests.passes.search.local.random_layers import layer

METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sparsegpt": lambda weight, gram: sparsegpt(weight, gram, 30, block=5),
    "wanda": lambda weight, gram: wanda_sparse(weight, gram, 30),
    "gptq": lambda weight, gram: gptq(weight, gram, 4, 4, block=3).dequantize(),
    "obs": lambda weight, gram: (
        remove_groups(weight, gram, torch.arange(12).view(6, 2), [2], target=gram @ weight.T)[0].weight
    ),
    "dense factors": lambda weight, gram: factorize(weight, gram, 4).product(),
    "sparse factors": lambda weight, gram: factorize(weight, gram, 4, 2).product(),
    "columns": optimal_compensation_scores,
    "condition": lambda weight, gram: condition(gram),
}


@pytest.mark.parametrize("method", METHODS)
def test_float32_follows_float64(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer(5, 12, seed=11)
    weight, gram = weight.float(), (inputs.T @ inputs).float()
    exact = METHODS[method](weight, gram)
    monkeypatch.setattr(damping, "FLOAT64_WIDTH", 6)
    rough = METHODS[method](weight, gram)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact) or method == "wanda", "this did not run in float32"
    torch.testing.assert_close(rough, exact.float(), rtol=1e-3, atol=1e-4)
