"""Run a program so that gradients reach its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ....ir.errors import GraphlatheError, PreconditionError
from ....ir.execute import as_traced, last_uses, subgraph_module
from ....ir.flow import reads_shape_only
from ....ir.program import ORIGIN, Program
from ....ir.weights import TensorSource, Weight, source_key

_NAME = "distillation"


class Trainer:
    """A program's main graph with some of its weights as leaves of autograd.

    Leaves are copies in float32 (float64 for float64 weights), and are cast to the weight's own type when they are
    read. Weights that are expressions over one tensor (a table and its transpose) share a leaf.

    Args:
        program: the program; its weights are not changed.
        names: the weights to train.

    Attributes:
        leaves: the tensors to optimise.
        stopped: the operators at which gradients ended in the last `run`: a floating operand needed them, and no
            floating result did.
    """

    def __init__(self, program: Program, names: Collection[str]) -> None:
        self.program = program
        self.leaves: list[torch.Tensor] = []
        self.stopped: list[fx.Node] = []
        self._of: dict[str, tuple[int, Weight]] = {}
        self._constants: dict[str, Any] = {}
        known: dict[Any, int] = {}
        for name in sorted(names):
            weight = program.weights[name]
            key = source_key(weight.source)
            if key not in known:
                known[key] = len(self.leaves)
                source = weight.source.load()
                wide = torch.float64 if source.dtype == torch.float64 else torch.float32
                copied = source.detach().to(wide, copy=True).contiguous()
                self.leaves.append(copied.requires_grad_(True))
            self._of[name] = (known[key], weight)

    def weights(self) -> dict[str, Weight]:
        """The trained weights: new sources under the expressions that the weights had."""
        sources: dict[int, TensorSource] = {}
        result: dict[str, Weight] = {}
        for name, (place, weight) in self._of.items():
            if place not in sources:
                sources[place] = TensorSource(self.leaves[place].detach().to(weight.source.dtype, copy=True))
            result[name] = Weight(sources[place], weight.steps)
        return result

    def _value(self, name: str) -> Any:
        if name in self._of:
            place, weight = self._of[name]
            # The steps of a weight are operators of PyTorch: gradients go through them.
            return Weight(TensorSource(self.leaves[place]), weight.steps).tensor().to(weight.dtype)
        if name not in self._constants:
            program = self.program
            self._constants[name] = (
                subgraph_module(name, program.subgraphs, program.weights)
                if name in program.subgraphs
                else program.weights[name].tensor().detach()
            )
        return self._constants[name]

    def run(
        self, feeds: Mapping[str, Any], watch: Collection[fx.Node] = ()
    ) -> tuple[dict[str, Any], dict[fx.Node, Any]]:
        """The outputs by name, and the values of the watched nodes.

        Args:
            feeds: a value for each input.
            watch: nodes of the main graph.

        Raises:
            GraphlatheError: an operator failed.
        """
        entry = self.program.main
        by_target = {str(p.target): as_traced(feeds[n]) for n, p in zip(entry.inputs, entry.placeholders, strict=True)}
        dead_after = last_uses(entry.graph)
        env: dict[fx.Node, Any] = {}
        watched: dict[fx.Node, Any] = {}
        self.stopped = []
        for node in entry.graph.nodes:
            if node.op == "output":
                values = map_arg(node.args[0], env.__getitem__)
                return dict(zip(entry.outputs, values, strict=True)), watched  # type: ignore[arg-type]
            if node.op == "placeholder":
                value = by_target[str(node.target)]
            elif node.op == "get_attr":
                value = self._value(str(node.target))
            else:
                value = self._call(node, env)
            env[node] = value
            if node in watch:
                watched[node] = value
            for dead in dead_after.get(node, ()):
                env.pop(dead, None)
        raise GraphlatheError("the graph has no output node")

    def _call(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        try:
            value = node.target(*map_arg(node.args, env.__getitem__), **map_arg(node.kwargs, env.__getitem__))  # type: ignore[operator]
        except GraphlatheError:
            raise
        except Exception as error:
            raise GraphlatheError(
                f"{node.target} failed: {error}", node=node.name, origin=node.meta.get(ORIGIN)
            ) from error
        if torch.is_grad_enabled() and not _needs(value):
            wanted = any(_needs(env[a]) for a in node.all_input_nodes)
            if wanted and not reads_shape_only(str(getattr(node.target, "_opname", ""))):
                self.stopped.append(node)
        return value

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradient to the leaves.

        Raises:
            PreconditionError: no gradient reaches any of them; the message names the operators where they end.
        """
        if not loss.requires_grad:
            raise self._refusal("no gradient reaches the weights")
        try:
            loss.backward()
        except (RuntimeError, NotImplementedError) as error:
            raise self._refusal(f"an operator has no gradient ({error})") from error

    def _refusal(self, what: str) -> PreconditionError:
        first = self.stopped[0] if self.stopped else None
        named = ", ".join(dict.fromkeys(str(n.target) for n in self.stopped)) or "an operator before the outputs"
        return PreconditionError(
            f"a program without gradients cannot be distilled: {what}; they end at {named}",
            pass_name=_NAME,
            node=first.name if first is not None else None,
            expected="operators that can be differentiated between the weights and the outputs",
            remedy="distil before quantising, or name weights behind that operator with trainable=",
        )


def _needs(value: Any) -> bool:
    """Whether a gradient is wanted of a value (of one of a tuple's)."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(v, torch.Tensor) and v.requires_grad for v in values)
