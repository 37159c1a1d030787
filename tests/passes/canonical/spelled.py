"""What the tests of raising passes share: a function of tensors and weights as a canonical program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.verify import verify
from graphlathe.passes.base import Context, Pass, Stats
from graphlathe.passes.canonical.canonicalize import Canonicalize


class Spelled(nn.Module):
    """``function(inputs..., weights by name...)`` as a module."""

    def __init__(self, function: Callable[..., Any], weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        self.names = list(weights)
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **{name: getattr(self, name) for name in self.names})


def raised(
    pass_: Pass, function: Callable[..., Any], *inputs: Tensor, **weights: Tensor
) -> tuple[Program, Program, Stats]:
    """Trace, canonicalise and raise; the result verifies, equals what it was, and is raised no further.

    Args:
        pass_: the raising pass.
        function: called with the inputs, and the weights by name.
        inputs: examples; their first axis is dynamic where they have more than one.
        weights: become weights of the program.

    Returns:
        The canonical program, the raised one, and what the pass said.
    """
    module = Spelled(function, weights).eval()
    dynamic = {f"inputs_{i}": {0: "B"} for i, x in enumerate(inputs) if x.dim() > 1}
    before = trace(module, inputs, dynamic=dynamic or None)
    Canonicalize().run(before, Context())
    after = before.clone()
    stats = pass_.run(after, Context())
    verify(after, 3, reference=before, feeds=[before.feeds(*inputs)], pass_name=pass_.name)
    again = after.clone()
    pass_.run(again, Context())
    assert again.mutations == 0, f"not idempotent: {again.to_text()}"
    return before, after, stats
