"""Functions that an exported file carries for operators of ours that ONNX has no operator for.

A function says in one node what a page of standard operators does: the file stays readable, `ir.from_onnx` reads our
operator back, and a runtime that does not know it runs the body, which holds standard operators only.
"""

from __future__ import annotations

from string import Template
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    from .recorder import Recorder

DOMAIN = "graphlathe"

# The rows of each expert are picked, multiplied and put back, one expert after the other.
_EXPERT_LINEAR = """
<domain: "graphlathe", opset_import: ["" : $opset]>
$name (x, weight, indices $inputs) => (result) {
  chosen = Cast <to = 7> (indices)
  one = Constant <value_ints = [1]> ()
  tokens = Shape (chosen)
  row_shape = Concat <axis = 0> (tokens, one)
  rows = Expand (x, row_shape)
  width = Shape <start = 2, end = 3> (weight)
  size = Concat <axis = 0> (tokens, width)
  number = Constant <value_float = 0.0> ()
  zero = CastLike (number, x)
  empty = Expand (zero, size)
  experts = Shape <start = 0, end = 1> (weight)
  first = Constant <value_ints = [0]> ()
  count = Squeeze (experts, first)
  yes = Cast <to = 9> (one)
  go = Squeeze (yes)
  result = Loop (count, go, empty) <body = one_expert (int64 expert, bool going, before) => (go_on, after) {
    go_on = Identity (going)
    same = Equal (chosen, expert)
    found = NonZero (same)
    places = Transpose <perm = [1, 0]> (found)
    mine = GatherND (rows, places)
    matrix = Gather <axis = 0> (weight, expert)
    product = MatMul (mine, matrix)
    $shift
    after = ScatterND (before, places, $written)
  }>
}
"""

_SHIFT = """offset = Gather <axis = 0> (bias, expert)
    shifted = Add (product, offset)"""

_TEXTS = {
    "ExpertLinear": (_EXPERT_LINEAR, {"inputs": "", "shift": "", "written": "product"}),
    "BiasedExpertLinear": (_EXPERT_LINEAR, {"inputs": ", bias", "shift": _SHIFT, "written": "shifted"}),
}

NAMES = tuple(_TEXTS)


def call(recorder: Recorder, name: str, *inputs: ir.Value, dtype: ir.DataType) -> Any:
    """Record a call of a function of ours, which the file will carry.

    Args:
        recorder: of the graph.
        name: one of `NAMES`.
        inputs: its operands.
        dtype: the element type of its result.
    """
    result = recorder.value(None)
    result.dtype = dtype
    recorder.nodes.append(ir.Node(DOMAIN, name, inputs, outputs=[result]))
    recorder.called.add(name)
    return result


def function_of(name: str, opset: int) -> ir.Function:
    """The definition, in operators of an opset from 18 on."""
    import onnx.parser

    text, parts = _TEXTS[name]
    filled = Template(text).substitute(parts, name=name, opset=opset)
    return ir.serde.deserialize_function(onnx.parser.parse_function(filled))
