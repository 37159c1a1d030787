"""Sequential units: blocks of a convolutional network that have the operators of a residual block, but no addition.

MobileNet and EfficientNet leave the addition out where a block changes the resolution or the number of channels. Such a
block is recognised by its **skeleton**, the row of kernels along immediate dominators: it equals that of an identity
unit of the neighbouring chain, or its last part of at least three operators (a first block expands no channels).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from .branches import is_depthwise, kernel_shape
from .chains import Chain
from .flow import Flow, op_name
from .residual import Unit

Skeleton = tuple[str, ...]

_SHORTEST = 2
_SHORTEST_PART = 3


def token(flow: Flow, node: fx.Node) -> str:
    """The kind of kernel that a value comes from; empty for everything else."""
    name = op_name(node)
    if name.startswith("conv"):
        if is_depthwise(node):
            return "depthwise"
        return "pointwise" if all(s == 1 for s in kernel_shape(node)[2:]) else "spatial"
    if name == "mul" and any(flow.shape(a) != flow.shape(node) for a in flow.operands(node)):
        return "gate"
    return "linear" if name in ("linear", "addmm", "mm", "matmul") else ""


def path_to(flow: Flow, node: fx.Node | None, top: fx.Node | None) -> list[fx.Node] | None:
    """The dominators from ``node`` up to ``top`` (left out), nearest first; None if ``top`` is none of them."""
    path: list[fx.Node] = []
    while node is not None and node is not top:
        path.append(node)
        node = flow.dominators.parent.get(node)
    return path if node is top else None


def skeleton(flow: Flow, unit: Unit) -> Skeleton:
    """The kernels of an identity unit's branch, from its start to its output."""
    path = path_to(flow, unit.leaves[0][1], unit.start) or []
    return tuple(t for node in reversed(path) if (t := token(flow, node)))


def join(flow: Flow, chains: Sequence[Chain]) -> list[Chain]:
    """Join chains that only sequential units separate, and add those before the first and after the last unit."""
    known: dict[Chain, set[Skeleton]] = {}
    for chain in chains:
        found = {skeleton(flow, u) for u in chain.units if u.kind == "identity"}
        known[chain] = {s for s in found if len(s) >= _SHORTEST and "depthwise" in s and s[-1] == "pointwise"}
    joined: list[Chain] = []
    last: dict[Unit, Chain] = {}
    for chain in chains:
        before = last.get(chain.follows) if chain.follows is not None else None
        shapes = known[chain] | (known[before] if before is not None else set())
        units, complete = _parse(flow, chain.before[::-1], shapes)
        if before is not None and before.units[-1] is chain.follows and units and complete:
            _attach(before, units, chain)
            known[before] = shapes
            chain = before
        else:
            chain.units[:0] = units
            joined.append(chain)
        last.update((u, chain) for u in chain.units)
    for chain in joined:
        _extend(flow, chain, known[chain])
    return joined


def _attach(before: Chain, units: list[Unit], chain: Chain) -> None:
    path = chain.before[::-1]
    before.units[-1].tail = path[: path.index(units[0].start) + 1] if units[0].start in path else []
    before.units += units + chain.units


def _parse(flow: Flow, path: Sequence[fx.Node], shapes: Collection[Skeleton]) -> tuple[list[Unit], bool]:
    """The sequential units at the end of a path (in execution order), and whether they are all of its kernels."""
    kernels = [i for i, node in enumerate(path) if token(flow, node)]
    tokens = tuple(token(flow, path[i]) for i in kernels)
    cuts: list[int] = []
    stop = len(tokens)
    while stop:
        length = max((_match(tokens[:stop], shape) for shape in shapes), default=0)
        if not length:
            break
        stop -= length
        cuts.append(stop)
    units: list[Unit] = []
    end = len(path)
    for cut in cuts:
        first = kernels[cut]
        start = path[first - 1] if first else path[first].all_input_nodes[0]
        units.append(Unit(start, path[end - 1], "sequential", [], [list(path[first:end])]))
        end = first
    return units[::-1], stop == 0


def _match(tokens: Skeleton, shape: Skeleton) -> int:
    if tokens[-len(shape) :] == shape:
        return len(shape)
    parts = [shape[i:] for i in range(1, len(shape) - _SHORTEST_PART + 1)]
    return max((len(part) for part in parts if tokens[-len(part) :] == part), default=0)


def _extend(flow: Flow, chain: Chain, shapes: Collection[Skeleton]) -> None:
    """Add the sequential units that follow the last unit, on the way to the output that is furthest from it."""
    end = chain.units[-1].end
    outputs = [a for a in flow.output.all_input_nodes if flow.is_float(a)]
    paths = [p for a in outputs if (p := path_to(flow, a, end)) is not None]
    if not paths or not shapes:
        return
    path = max(paths, key=len)[::-1]
    while path:
        kernels = [i for i, node in enumerate(path) if token(flow, node)]
        tokens = tuple(token(flow, path[i]) for i in kernels)
        length = max((len(s) for s in shapes if tokens[: len(s)] == s), default=0)
        if not length:
            return
        stop = kernels[length] if length < len(kernels) else kernels[length - 1] + 1
        chain.units.append(Unit(chain.units[-1].end, path[stop - 1], "sequential", [], [list(path[:stop])]))
        path = path[stop:]
