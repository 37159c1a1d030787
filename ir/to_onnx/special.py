"""Our own translations: operators that PyTorch's translations get wrong, lack, or write in a roundabout way.

A translation takes the translator, the node, and the node's arguments (ONNX values, or plain numbers), and returns
the ONNX value of the result, or NotImplemented to leave the node to PyTorch's translation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

if TYPE_CHECKING:
    from .translate import Translator

aten = torch.ops.aten
Special = Callable[..., Any]

SPECIAL: dict[Any, Special] = {}


def special(*targets: Any) -> Callable[[Special], Special]:
    """Register a translation of some operators."""

    def register(function: Special) -> Special:
        SPECIAL.update(dict.fromkeys(targets, function))
        return function

    return register


@special(aten.item.default, aten._local_scalar_dense.default)
def item(t: Translator, node: fx.Node, x: ir.Value) -> Any:
    """``tensor.item()``: the one element as a number, in the type that Python would give it."""
    from .symbolic import scalar_type

    kind = scalar_type(node.meta["val"])
    scalar = t.recorder.op("Reshape", x, t.recorder.constant([1], ir.DataType.INT64))
    scalar = t.recorder.op("Squeeze", scalar, t.recorder.constant([0], ir.DataType.INT64))
    return scalar if kind is None else t.recorder.op("Cast", scalar, to=int(kind))
