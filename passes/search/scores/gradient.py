"""First-order Taylor: how much a loss would change, to first order, if an atom's weights became zero.

    E_batch | sum over the atom's weights of w * dL/dw |

Source: Molchanov et al. 2017 (arXiv 1611.06440) and 2019 (arXiv 1906.10771), for groups of weights.

The loss needs no labels. Where outputs look like logits it is the cross-entropy with the model's own most probable
entry, averaged over the positions that count: the divergence from the model's own distribution, which other scores use,
has its minimum there and no gradient. Else it is half the mean square of the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ....ir.axes.relate import bind
from ....ir.errors import GraphlatheError, PreconditionError
from ....ir.execute import as_traced, subgraph_module
from ....ir.flow import op_name
from ....ir.program import ORIGIN, Program
from ...base import Batch, Context
from ...fidelity import logits_outputs, position_mask, seeded
from ..sites import ChannelSite
from ..statistics import calibration
from .base import AtomScores, check_floating, element_sums

_CONSTANT = {
    "detach", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
    "rand_like", "randn_like",
}  # fmt: skip
"""Operators whose results do not depend on the numbers that they are given."""


def gradient(program: Program, sites: Sequence[ChannelSite], ctx: Context) -> AtomScores:
    """``E |sum of w * dL/dw|`` over the calibration batches.

    All activations of one batch are held at once: a batch that is too large has to be divided. Running means and
    variances of batch norms are constants.

    Args, returns: as `base.ChannelScore`.

    Raises:
        PreconditionError: an operator has no gradient, no output can be differentiated, or a site's weight does not
            hold floating-point numbers.
    """
    for site in sites:
        check_floating(program, site)
    names = dict.fromkeys(member.weight for site in sites for member in site.group.members)
    fixed = _running_statistics(program)
    values = {name: program.weights[name].tensor().detach().clone() for name in names}
    leaves = {name: value.requires_grad_() for name, value in values.items() if name not in fixed}
    batches = calibration(ctx)
    totals: AtomScores = {site.index: np.zeros(site.size) for site in sites}
    for batch in ctx.progress(batches, len(batches), "gradients"):
        loss = seeded(lambda batch=batch: _loss(_run(program, program.feeds(**batch), leaves), batch))
        if not loss.requires_grad:
            raise PreconditionError(
                "no output depends on the sites' weights by operators that have a gradient",
                expected="floating-point outputs",
                remedy="use a score without gradients",
            )
        try:
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        except RuntimeError as error:
            raise _no_gradient(_culprit(program, program.feeds(**batch), leaves), error) from error
        slopes: dict[str, Tensor | None] = dict(zip(leaves, found, strict=True))
        terms = {
            name: torch.zeros_like(value) if (slope := slopes.get(name)) is None else value.detach() * slope
            for name, value in values.items()
        }
        for site in sites:
            totals[site.index] += np.abs(element_sums(site, terms))
    return {index: values / len(batches) for index, values in totals.items()}


def _running_statistics(program: Program) -> set[str]:
    """Weights that PyTorch refuses to differentiate by."""
    found: set[str] = set()
    for node in program.graph.nodes:
        if "norm" in op_name(node):
            args = bind(node)
            read = (args.get("running_mean"), args.get("running_var"))
            found |= {str(value.target) for value in read if isinstance(value, fx.Node) and value.op == "get_attr"}
    return found


def _loss(outputs: Mapping[str, Any], batch: Batch) -> Tensor:
    logits = logits_outputs(outputs)
    parts: list[Tensor] = []
    for name in logits:
        value = outputs[name]
        rows = value.reshape(-1, value.shape[-1])
        mask = position_mask(batch, value.shape[:-1])
        rows = rows if mask is None else rows[mask.reshape(-1) != 0]
        parts.append(
            torch.nn.functional.cross_entropy(rows.float() if rows.dtype.itemsize < 4 else rows, rows.argmax(-1))
        )
    if not logits:
        floating = [v for v in outputs.values() if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]
        parts = [v.square().mean() / 2 for v in floating]
    return torch.stack([part.double() for part in parts]).sum() if parts else torch.zeros(())


def _run(program: Program, feeds: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """Run the main entry and keep what differentiating it takes (`ir.execute` keeps nothing).

    Raises:
        PreconditionError: an operator's result does not carry the gradient of its operands.
    """
    entry = program.main
    program.check_feeds(feeds)
    given = {p: as_traced(feeds[name]) for name, p in zip(entry.inputs, entry.placeholders, strict=True)}
    env: dict[fx.Node, Any] = {}
    with torch.enable_grad():
        for node in entry.graph.nodes:
            match node.op:
                case "placeholder":
                    env[node] = given[node]
                case "get_attr":
                    env[node] = _attribute(program, str(node.target), leaves)
                case "output":
                    break
                case _:
                    env[node] = _call(node, map_arg(node.args, env.__getitem__), map_arg(node.kwargs, env.__getitem__))
                    lost = (
                        isinstance(env[node], Tensor) and env[node].is_floating_point() and not env[node].requires_grad
                    )
                    if lost and op_name(node) not in _CONSTANT and any(_carries(env[o]) for o in node.all_input_nodes):
                        raise _no_gradient(node, None)
    return {n: env[v] if isinstance(v, fx.Node) else v for n, v in zip(entry.outputs, entry.output_values, strict=True)}


def _attribute(program: Program, name: str, leaves: Mapping[str, Tensor]) -> Any:
    if name in program.subgraphs:
        return subgraph_module(name, program.subgraphs, program.weights)
    return leaves[name] if name in leaves else program.weights[name].tensor()


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except GraphlatheError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        raise _no_gradient(node, error) from error


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _culprit(program: Program, feeds: Mapping[str, Any], leaves: Mapping[str, Tensor]) -> fx.Node | None:
    """The first operator on the way from the leaves that cannot be differentiated by itself."""
    entry = program.main
    env: dict[fx.Node, Any] = {}
    moved: set[fx.Node] = set()
    given = {p: as_traced(feeds[name]) for name, p in zip(entry.inputs, entry.placeholders, strict=True)}

    def apart(operand: fx.Node) -> Any:
        """A value that is the start of a graph of its own."""
        value = env[operand]
        if operand not in moved or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().clone().requires_grad_()

    for node in entry.graph.nodes:
        if node.op == "output":
            return None
        if node.op != "call_function":
            env[node] = given[node] if node.op == "placeholder" else _attribute(program, str(node.target), leaves)
            if node.op == "get_attr" and str(node.target) in leaves:
                moved.add(node)
            continue
        if not moved.isdisjoint(node.all_input_nodes):
            moved.add(node)
        args, kwargs = map_arg(node.args, apart), map_arg(node.kwargs, apart)
        with torch.enable_grad():
            value = env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            results = [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if _carries(v)]
            try:
                if results:
                    torch.stack([v.sum() for v in results]).sum().backward()
            except RuntimeError:
                return node
    return None


def _no_gradient(node: fx.Node | None, error: Exception | None) -> PreconditionError:
    why = f": {error}" if error is not None else ""
    what = "an operator" if node is None else f"'{op_name(node)}'"
    return PreconditionError(
        f"{what} has no gradient{why}",
        node=node.name if node is not None else None,
        origin=node.meta.get(ORIGIN) if node is not None else None,
        expected="operators that PyTorch can differentiate",
        remedy="use a score without gradients, or the passes 'raise' and 'canonicalize' first",
    )
