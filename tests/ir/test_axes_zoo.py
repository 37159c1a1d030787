"""Coupled-channel groups of the zoo: every one that can be cut is cut to half."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import pytest

from graphlathe.ir.axes import ChannelGroup, find_groups
from graphlathe.ir.program import Program
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.raise_all import RaiseAll
from graphlathe.tools import zoo
from tests.masked import check_cut, half
from tests.zoo_files import from_our_file
from tests.zoo_programs import SAMPLE, over_zoo, traced, zoo_parameters

RAISED = (*SAMPLE, "mobilenet_v2", "gpt_neox", "gemma3", "olmoe", "gpt_oss", "mamba2", "plain_squeeze_excite")
ATTENTION = "aten.scaled_dot_product_attention"
QUICK = ("llama", "plain_shuffle", "plain_densenet")


def every_one(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    return [group for group in groups if group.prunable]


def alike(group: ChannelGroup) -> tuple[object, ...]:
    """What groups have in common that blocks repeat: equal units of weights that are cut alike."""
    return group.unit, group.zero_reason.partition("(")[0], *((m.dim, m.reads) for m in group.members)


def one_of_each_kind(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """The last group of every unit and every reason why zeroing is something else (the first ones are often stems)."""
    return list({(g.unit, g.zero_reason.partition("(")[0]): g for g in groups if g.prunable}.values())


def check_zoo(program: Program, name: str, choose: Callable[[list[ChannelGroup]], Iterable[ChannelGroup]]) -> None:
    """Every dimension of every weight is in some group, and each chosen group can be cut to half."""
    model = zoo.get(name)
    feeds = model.inputs(model.unseen_sizes[0]) if model.dynamic else model.example()
    groups = find_groups(program)
    found = {(m.weight, m.dim) for group in groups for m in group.members}
    read = {str(n.target) for n in program.graph.find_nodes(op="get_attr") if n.users} - set(program.subgraphs)
    assert found == {(n, d) for n in read for d, size in enumerate(program.weights[n].shape) if size > 1}
    assert all(bool(group.reason) != group.prunable for group in groups)
    seen: set[tuple[object, ...]] = set()
    for group in choose(groups):
        # Types and text, the slow part, once for groups that are alike; what they compute, always.
        check_cut(program, group, feeds, half(group), level=1 if alike(group) in seen else 2)
        seen.add(alike(group))


def kinds(program: Program) -> Counter[tuple[str, int, bool]]:
    return Counter((group.unit, group.size, group.zeroable) for group in find_groups(program) if group.prunable)


def products(program: Program) -> Counter[str]:
    """How often each operator that multiplies tensors is there."""
    targets = (str(node.target).rpartition(".")[0] for node in program.graph.nodes if node.op == "call_function")
    return Counter(t for t in targets if t in ("aten.linear", "aten.matmul", "aten.conv2d", ATTENTION))


@pytest.mark.parametrize("name", zoo_parameters((*SAMPLE, "mobilenet_v2", "gpt_neox"), quick=("llama", "mobilenet_v2")))
def test_zoo_from_onnx(name: str) -> None:
    """A file has other operators and transposed weights; raised, its groups are those of the traced model."""
    program, imported = traced(name).clone(), from_our_file(name).clone()
    for each in (program, imported):
        RaiseAll().run(each, Context())
    assert kinds(imported) == kinds(program)
    assert products(imported) == products(program)  # nothing is left of a spelling that was raised


@over_zoo(quick=QUICK)
def test_zoo_as_traced(name: str) -> None:
    """Every group of every model, cut to half: verified, running, and equal to the masked graph."""
    check_zoo(traced(name), name, every_one)


@pytest.mark.parametrize("name", zoo_parameters(RAISED, quick=()))
def test_zoo_raised(name: str) -> None:
    """The same on the raised form, for a group of each kind."""
    program = traced(name).clone()
    RaiseAll().run(program, Context())
    check_zoo(program, name, one_of_each_kind)
