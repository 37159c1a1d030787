"""Sites of zoo models: kinds, order, blocks, readers."""

from __future__ import annotations

from collections import Counter

import pytest

from graphlathe.ir.axes import find_groups
from graphlathe.ir.structure import structure
from graphlathe.passes.search.sites import KINDS, channel_sites
from tests.passes.search.small_models import MODELS, found, sites_of
from tests.zoo_programs import traced, zoo_parameters

WANTED: dict[str, dict[str, int]] = {
    "llama": {"stream": 1, "qk-channels": 1, "heads": 3, "query-heads": 3, "value-channels": 3, "mlp": 3},
    "bert": {"heads": 3, "qk-channels": 3, "value-channels": 3, "mlp": 3},
    "gpt2": {"stream": 1, "heads": 3, "qk-channels": 3, "value-channels": 3, "mlp": 3},
    "plain_resnet": {"stream": 2, "channels": 3},
}


@pytest.mark.parametrize("name", zoo_parameters(WANTED))
def test_kinds(name: str) -> None:
    sites = sites_of(name)
    assert dict(Counter(site.kind for site in sites)) == WANTED[name]
    assert {site.kind for site in sites} <= set(KINDS)
    mlps = [site for site in sites if site.kind == "mlp"]
    assert [(site.label, site.block) for site in mlps] == [(f"mlp of block {n}", n) for n in range(len(mlps))]


@pytest.mark.parametrize("name", zoo_parameters(MODELS))
def test_order_and_what_is_left_out(name: str) -> None:
    program, sites = traced(name), sites_of(name)
    groups = find_groups(program)
    blocked = channel_sites(program, found(name), KINDS)[1]
    assert len(sites) == sum(group.prunable for group in groups)
    stuck = Counter[str]()
    weights = Counter[str]()
    for group in groups:
        # A convolution's window is no channel: that it stays explains nothing.
        if not group.prunable and any(len(program.weights[m.weight].shape) < 4 or m.dim < 2 for m in group.members):
            stuck[group.reason] += 1
            weights[group.reason] += sum(program.weights[m.weight].numel for m in group.members)
    assert blocked == stuck and all(blocked)
    assert [weights[reason] for reason in blocked] == sorted(weights.values(), reverse=True)
    assert [site.index for site in sites] == list(range(len(sites)))
    assert [site.first for site in sites] == sorted(site.first for site in sites)
    nodes = list(program.graph.nodes)
    for site in sites:
        assert nodes[site.first].op == "call_function"
        places = {place for place, _ in site.group.places}
        assert all(n.name not in places for n in nodes[: site.first] if n.op == "call_function")
        assert all(consumer.weight in program.weights for consumer in site.consumers)
        if site.block is not None:
            blocks = [b for stream in found(name).streams for b in stream.blocks]
            inside = {*blocks[site.block].nodes, *(n for branch in blocks[site.block].branches for n in branch.nodes)}
            assert all(consumer.node in inside for consumer in site.consumers)


@pytest.mark.parametrize("kind", ["mlp", "heads", "stream"])
def test_some_kinds_keep_the_numbers_of_all(kind: str) -> None:
    program = traced("llama").clone()
    some = channel_sites(program, structure(program), (kind,))[0]
    assert [(s.index, s.label) for s in some] == [(s.index, s.label) for s in sites_of("llama") if s.kind == kind]


def test_experts_are_an_mlp() -> None:
    program = traced("mixtral")
    kinds = Counter(site.kind for site in channel_sites(program, structure(program), KINDS)[0])
    assert kinds["heads"] and kinds["mlp"] + kinds["channels"]
