"""Shape inference: run an operator on fake tensors.

`Inference` remembers what it inferred by operator and argument types, so that the blocks of a deep model, which repeat
the same operators on the same shapes, cost little more than one of them.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.fx.node import map_arg

from .errors import GraphlatheError, UnsupportedOpError, VerifyError
from .execute import copy_graph
from .types import expr_of, is_unbacked, symbols_of
from .weights import Weight

if TYPE_CHECKING:
    from .program import Program


def fake_weight(program: Program, weight: Weight) -> torch.Tensor:
    """A fake tensor of a weight's shape and dtype."""
    with program.fake_mode:
        return torch.empty(weight.shape, dtype=weight.dtype)


def fake_subgraph(program: Program, name: str) -> fx.GraphModule:
    """A nested graph as a callable module on fake tensors."""
    graph = program.subgraphs[name]
    root: dict[str, Any] = {}
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        root[target] = (
            fake_subgraph(program, target)
            if target in program.subgraphs
            else fake_weight(program, program.weights[target])
        )
    return fx.GraphModule(root, copy_graph(graph), class_name=name)


def infer(program: Program, node: fx.Node) -> Any:
    """Infer a node's value (fake tensors, symbolic numbers) from its arguments' values.

    Raises:
        VerifyError: the operator refuses them.
        UnsupportedOpError: the operator has no shape inference.
    """

    def value_of(operand: fx.Node) -> Any:
        if operand.op == "get_attr" and str(operand.target) in program.subgraphs:
            return fake_subgraph(program, str(operand.target))
        if "val" not in operand.meta:
            raise VerifyError("a value without shape is used", node=operand.name, origin=operand.meta.get("origin"))
        return operand.meta["val"]

    args = map_arg(node.args, value_of)
    kwargs = map_arg(node.kwargs, value_of)
    try:
        # As in tracing: some operators take symbolic sizes only through their Python decompositions.
        with program.fake_mode, enable_python_dispatcher(), torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except GraphlatheError:
        raise
    except NotImplementedError as error:
        raise UnsupportedOpError(
            f"{node.target} has no shape inference: {error}", node=node.name, origin=node.meta.get("origin")
        ) from error
    except Exception as error:
        raise VerifyError(
            f"{node.target} refuses its arguments: {error}", node=node.name, origin=node.meta.get("origin")
        ) from error


_MOST = 1 << 14  # results that clones of one program remember together, so that a long search does not fill the memory


class Inference:
    """`infer` with a memory for one program.

    Args:
        program: whose fake mode and nested graphs are used.
        share: whether equal results may be one object. Nodes of a graph must not share one: a fake tensor remembers
            the data-dependent sizes that were read from it.
        known: an inference over another program of the same fake mode and nested graphs, whose memory this one starts
            with.
        common: a memory to read and write, of programs of the same fake mode whose nested graphs may differ.

    Attributes:
        runs: how often an operator was really run.
    """

    def __init__(
        self,
        program: Program,
        *,
        share: bool = False,
        known: Inference | None = None,
        common: MutableMapping[Any, Any] | None = None,
    ) -> None:
        self.program = program
        self.share = share
        self.runs = 0
        self._common = common is not None
        self._known = common if common is not None else dict(known._known) if known is not None else {}
        self._types: dict[int, tuple[Any, Any]] = {}  # by id of a value, which is kept alive beside its key

    def value(self, node: fx.Node) -> Any:
        """The inferred value of a node (see `infer`)."""
        try:
            key = (node.target, self._key(node.args), self._key(node.kwargs))
            known = self._known.get(key, self)
        except TypeError:  # an argument that cannot be hashed, or is no type
            return self._run(node)
        if known is not self:
            return known if self.share else self._twin(known)
        value = self._run(node)
        given: set[Any] = set()
        for operand in node.all_input_nodes:
            given |= symbols_of(operand.meta.get("val"))
        if not any(is_unbacked(s) for s in symbols_of(value) - given):
            if len(self._known) >= _MOST and self._common:
                self._known.clear()  # what a long search inferred first is not asked for again
            self._known[key] = value if self.share else self._twin(value)
        return value

    def _twin(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            # Thirty times cheaper than an operator that makes a fake tensor.
            device = value.device
            with in_kernel_invocation_manager(self.program.fake_mode):
                return FakeTensor(self.program.fake_mode, value, device)
        if isinstance(value, (tuple, list)):
            return type(value)(self._twin(v) for v in value)
        return value

    def _run(self, node: fx.Node) -> Any:
        self.runs += 1
        return infer(self.program, node)

    def _key(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value.op == "get_attr" and "val" not in value.meta:
                if self._common:
                    raise TypeError("a nested graph is not known by its name")
                return ("graph", str(value.target))
            return self._type_key(value.meta.get("val"))
        if isinstance(value, dict):
            return tuple((k, self._key(v)) for k, v in sorted(value.items()))
        if isinstance(value, (tuple, list)):
            return (type(value).__name__, *map(self._key, value))
        if isinstance(value, slice):
            return ("slice", *map(self._key, (value.start, value.stop, value.step)))
        return (type(value).__name__, repr(value) if isinstance(value, float) else value)

    def _type_key(self, value: Any) -> Any:
        known = self._types.get(id(value))
        if known is not None:
            return known[1]
        if isinstance(value, torch.Tensor):
            sizes = tuple(map(expr_of, value.shape))
            strides = tuple(map(expr_of, value.stride())) if value.layout is torch.strided else ()
            key: Any = ("tensor", value.dtype, str(value.device), sizes, strides)
        elif isinstance(value, (tuple, list)):
            key = (type(value).__name__, *map(self._type_key, value))
        else:
            key = (type(value).__name__, expr_of(value))
        self._types[id(value)] = (value, key)
        return key
