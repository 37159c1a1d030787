"""Is zeroing an atom's weights the same as cutting it?

Where a channel meets a weight of its group in a sum (a linear layer, a convolution) it is: the weight is zero. Where it
is reduced otherwise, the question is whether its value is zero and whether a zero drops out: a sum yes, a mean no. Zero
is followed forward from the weights, which all are zero in the atom's place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from ..flow import is_view, op_name
from .relate import bind
from .space import Count, Index, Relation, Space, Sum, tensor_shape

# f(0) = 0, for one operand.
_KEEPS_ZERO = {
    "neg", "relu", "gelu", "silu", "tanh", "hardtanh", "relu6", "leaky_relu", "elu", "selu", "hardswish", "mish", "abs",
    "sqrt", "square", "sin", "erf", "sign", "clamp_max", "floor", "ceil", "round", "trunc", "sum",
    "linalg_vector_norm", "norm", "mean", "avg_pool2d", "avg_pool1d", "max_pool2d", "adaptive_avg_pool2d",
    "adaptive_avg_pool1d", "roll", "flip", "repeat", "tile", "repeat_interleave",
    "dropout", "constant_pad_nd", "glu", "tril", "triu", "cumsum", "asinh", "sinh", "tan", "log1p", "expm1",
}  # fmt: skip
_PRODUCTS = {"mul", "multiply", "matmul", "mm", "bmm", "einsum", "graphlathe.rotary_embedding", "logical_and"}
_RISKY = {"reciprocal": 0, "rsqrt": 0, "log": 0, "div": 1, "divide": 1, "true_divide": 1, "log2": 0, "log10": 0}


def why_not_zero(space: Space, atoms: dict[int, Index], relations: Iterable[Relation]) -> str:
    """Why zeroing is not cutting, or an empty string if it is."""
    places = {p for a in atoms if (p := space.place[a]) is not None}
    zeros = _Zeros(places)
    for relation in relations:
        if isinstance(relation, Count):
            return f"{relation.reason} (%{relation.node.name})"
        if isinstance(relation, Sum) and not any(zeros.is_zero(o) for o in relation.operands):
            return f"{op_name(relation.node)} adds values that are not zero (%{relation.node.name})"
    for node in zeros.active:
        for user in node.users:
            if _divides_by(user, node) and zeros.is_zero(node):
                return f"{op_name(user)} divides by zero, or takes its logarithm (%{user.name})"
    return ""


def _divides_by(user: fx.Node, node: fx.Node) -> bool:
    name = op_name(user)
    if name == "pow":
        return not isinstance(user.args[1], (int, float)) or user.args[1] < 0
    return name in _RISKY and len(user.args) > _RISKY[name] and user.args[_RISKY[name]] is node


class _Zeros:
    """Which values are zero where the atom was."""

    def __init__(self, places: set[tuple[fx.Node, int]]) -> None:
        self.places = places
        self.active = {node for node, _ in places}
        # A value of several tensors is as zero as what it is made from.
        self.active |= {node.all_input_nodes[0] for node in self.active if op_name(node) == "getitem"}
        self._known: dict[fx.Node, bool] = {}

    def is_zero(self, node: fx.Node) -> bool:
        """Whether an active value is zero there; a value that the cut does not touch is not."""
        if node not in self.active:
            return False
        stack = [node]
        while stack:  # a loop, as graphs are deeper than Python's stack
            top = stack[-1]
            waiting = [o for o in top.all_input_nodes if o in self.active and o not in self._known]
            if top not in self._known and waiting and top.op == "call_function":
                stack.extend(waiting)
                continue
            stack.pop()
            if top not in self._known:
                self._known[top] = self._decide(top)
        return self._known[node]

    def _of(self, operand: Any) -> bool:
        if isinstance(operand, fx.Node):
            return self._known.get(operand, False) if operand in self.active else False
        return isinstance(operand, (int, float)) and operand == 0

    def _decide(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return True
        if node.op != "call_function":
            return False
        name, args = op_name(node), bind(node)
        if name == "getitem":
            return self._of(node.args[0])
        operands = [n for n in node.all_input_nodes if tensor_shape(n) is not None]
        match name:
            case "linear":
                return self._layer(args["weight"], args["input"], args["bias"])
            case "conv1d" | "conv2d" | "conv3d" | "convolution":
                return self._layer(args["weight"], args["input"], args["bias"])
            case "addmm" | "baddbmm":
                factors = [args[k] for k in ("mat1", "mat2", "batch1", "batch2") if k in args]
                return self._of(args["self"]) and any(map(self._of, factors))
            case "batch_norm" | "group_norm" | "layer_norm" | "_native_batch_norm_legit_no_training":
                return self._of(args["input"]) and (args["bias"] is None or self._of(args["bias"]))
            case "rms_norm":
                return self._of(args["input"])
            case "scaled_dot_product_attention" | "graphlathe.attention":
                return self._of(args["value"])
            case "graphlathe.expert_linear":
                return self._layer(args["weight"], args["x"], args["bias"])
            case "_grouped_mm" | "transformers.grouped_mm_fallback" | "transformers.grouped_mm":
                return any(map(self._of, operands[:2]))
            case "embedding":
                return self._of(args["weight"])
            case "masked_fill":
                return self._of(args["self"]) and self._of(args["value"])
            case "where":
                return self._of(args["self"]) and self._of(args["other"])
            case "div" | "divide" | "true_divide":
                return self._of(args["self"]) and not self._of(args["other"])
            case "pow":
                exponent = args.get("exponent")
                return self._of(args["self"]) and isinstance(exponent, (int, float)) and exponent > 0
            case "clamp" | "clamp_min":
                low, high = (0 if args.get(name) is None else args[name] for name in ("min", "max"))
                numbers = isinstance(low, (int, float)) and isinstance(high, (int, float))
                return self._of(args["self"]) and numbers and low <= 0 <= high
            case "cat" | "concat" | "concatenate" | "stack":
                # What is cut from the result comes from the operands that are cut.
                return all(self._of(o) for o in operands if o in self.active)
            case "add" | "sub" | "maximum" | "minimum":
                return self._of(args.get("self")) and self._of(args.get("other"))
            case _ if name in _PRODUCTS:
                if name.startswith("graphlathe"):
                    return self._of(operands[0])
                # Where two dimensions are cut, one operand may be zero along the one and not along the other.
                several = sum(place[0] is node for place in self.places) > 1
                return (all if several else any)(self._of(o) for o in operands if not several or o in self.active)
            case "zeros_like" | "zeros" | "new_zeros":
                return True
            case _ if name in _KEEPS_ZERO or is_view(node):
                return bool(operands) and all(map(self._of, operands))
            case _:
                return False

    def _layer(self, weight: fx.Node, x: fx.Node, bias: fx.Node | None) -> bool:
        return (self._of(weight) or self._of(x)) and (bias is None or self._of(bias))
