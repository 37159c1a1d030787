"""The expander: one feed-forward layer from the heads that stay to the stream, in place of two layers.

    before   y = x + o W_o            z = y + act(n(y) W_up) W_down       o: all heads' outputs
    after    y = x                    z = y + act(o' V + c) U + b         o': the kept heads' outputs

Norms between the sums stay where they are. The expander starts from a closed form on calibration data, block by block,
each on what the blocks before it give *now*:

1. ``V, c``: the old layer's hidden units before their activation are regressed on ``o'``; the units stay whose
   regression, through the activation and the old ``W_down``, moves the stream most. Where the expander is wider than
   the old layer, random directions of the heads' outputs fill it up.
2. ``U, b``: ridge regression of what is missing, the dense model's ``z`` less the ``y`` of now, on the hidden units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx

from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ...ir.structure import MlpSite
from ...ir.weights import Weight
from .blocks import HeadBlock
from .observed import Observed, affine_fit, twin, unexplained
from .positions import rearranged

_aten = torch.ops.aten
_ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch._ops.OpOverload]] = {
    "gelu": (F.gelu, _aten.gelu.default),
    "relu": (F.relu, _aten.relu.default),
    "silu": (F.silu, _aten.silu.default),
}
_PARTS = ("up.weight", "up.bias", "down.weight", "down.bias")
_DAMPING_UP, _DAMPING_DOWN = 1e-4, 1e-3


def expand(now: Observed, dense: Observed, block: HeadBlock, width: int) -> float:
    """Rewrite one block whose heads were cut already.

    Args:
        now: the program, changed in place, on calibration data.
        dense: a clone of it from before any change, on the same data.
        block: the block, as it was found in the program.
        width: hidden units of the expander.

    Returns:
        The share of the missing part's variance that the closed form leaves over.

    Raises:
        PreconditionError: the data gives no finite numbers.
    """
    rewriter = Rewriter(now.program, "shrp")
    name = block.layer.activation if block.layer.activation in _ACTIVATIONS else "gelu"
    like, heads = block.branch.output, block.output.operand
    dtype = like.meta["val"].dtype
    inner, outer = (int(node.meta["val"].shape[-1]) for node in (heads, like))
    shapes = ((width, inner), (width,), (outer, width), (outer,))
    names = [rewriter.fresh_weight_name(f"shrp.{block.index}.expander.{part}") for part in _PARTS]
    # With norms before the sums, what the layer's result is added to was the attention's sum, which goes.
    base = block.attention.by if block.mlp.by is block.attention.replaced else block.mlp.by
    rewriter.replace(block.attention.replaced, block.attention.by, erase=False)
    with rewriter.before(like):
        # The closed form is fitted on the graph as it will be, so the graph comes first.
        v, c, u, b = (
            rewriter.weight(n, Weight.from_tensor(torch.zeros(shape, dtype=dtype)))
            for n, shape in zip(names, shapes, strict=True)
        )
        heads = rearranged(rewriter, heads, block.to_mlp, base)
        hidden = rewriter.call(_aten.linear.default, heads, v, c, like=like)
        hidden = rewriter.call(_ACTIVATIONS[name][1], hidden, like=like)
        result = rewriter.call(_aten.linear.default, hidden, u, b, like=like)
    rewriter.replace(like, result)
    rewriter.erase_dead()
    values, left = _fitted(now, dense, block, heads, base, width, _ACTIVATIONS[name][0])
    for weight, value in zip(names, values, strict=True):
        rewriter.weight(weight, Weight.from_tensor(value.to(dtype).contiguous().clone()))
    return left


def _fitted(
    now: Observed,
    dense: Observed,
    block: HeadBlock,
    operand: fx.Node,
    base: fx.Node,
    width: int,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[tuple[torch.Tensor, ...], float]:
    """The four weights, and what is left over."""
    generator = torch.Generator().manual_seed(block.index)
    inner = int(operand.meta["val"].shape[-1])
    heads, stream = now.rows([operand, base])
    up, added = (twin(dense.program, node) for node in (block.layer.up[0].node, block.mlp.replaced))
    inside = tuple(twin(dense.program, step) for step in block.in_layer)
    units, total = dense.rows([up, added], [inside, ()])
    units = _used(units, block.layer)
    # A stream in half precision may differ from the sum's operands: everything from here on is float64.
    missing = total.double() - stream.double()
    weight, bias = affine_fit(heads, units, _DAMPING_UP)
    hidden = activation(heads.double() @ weight.T + bias)
    effect = hidden.std(0) * _columns(dense.program, block.layer, hidden.shape[1])
    chosen = effect.argsort(descending=True, stable=True)[:width].sort().values
    weight, bias = weight[chosen], bias[chosen]
    if width > len(chosen):
        spread = heads.double().std(0).clamp_min(1e-12)
        extra = torch.randn(width - len(chosen), inner, generator=generator, dtype=torch.float64)
        extra = extra / spread / inner**0.5
        weight = torch.cat([weight, extra])
        bias = torch.cat([bias, -(extra @ heads.double().mean(0))])
    hidden = activation(heads.double() @ weight.T + bias)
    down, shift = affine_fit(hidden, missing, _DAMPING_DOWN)
    left = unexplained(missing, hidden @ down.T + shift)
    return (weight, bias, down, shift), left


def _used(units: torch.Tensor, layer: MlpSite) -> torch.Tensor:
    """The hidden units of the first map into them; of a fused one its own half."""
    channels = layer.up[0].channels
    return units if channels is None else units[:, channels[0] : channels[1]]


def _columns(teacher: Program, layer: MlpSite, count: int) -> torch.Tensor:
    """How strongly the old layer's output depends on each hidden unit: the norms of its columns; ones if unknown."""
    assert layer.down is not None
    weight = teacher.weights.get(str(layer.down.weight.target))
    if weight is None or weight.is_meta or len(weight.shape) != 2 or not weight.dtype.is_floating_point:
        return torch.ones(count, dtype=torch.float64)
    value = weight.tensor().double()
    norms = [value.norm(dim=dim) for dim in (0, 1) if value.shape[1 - dim] == count]
    return norms[0] if norms and value.shape[0] != value.shape[1] else torch.ones(count, dtype=torch.float64)
