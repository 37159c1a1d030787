"""Walks give what a whole run gives, with less work."""

from __future__ import annotations

import pytest
import torch

from graphlathe.passes.search.flow import Walk
from graphlathe.passes.search.levels import zeroed
from graphlathe.passes.search.units import removable_units, replacements
from tests.passes.search.small_models import batch, found, sites_of
from tests.zoo_programs import traced, zoo_parameters


@pytest.mark.parametrize("name", zoo_parameters(["llama", "t5", "plain_resnet"]))
@pytest.mark.parametrize("dropped", [False, True])
def test_walking_through_changed_layers(name: str, dropped: bool) -> None:
    program = traced(name)
    units = [u for u in removable_units(found(name), "block") if not u.blocked]
    alias = replacements(units[-1:]) if dropped else {}
    walk = Walk(program, found(name), batch(name), alias)
    weights = {}
    sites = [s for s in sites_of(name) if s.kind in ("mlp", "value-channels", "channels")]
    sites = [s for s in sites if not dropped or s.block != units[-1].index]
    assert len(sites) > 1
    for site in sites:
        operands = {consumer.operand for consumer in site.consumers}
        got = walk.values(operands, weights, site.first)
        view = program.clone()
        view.weights = {**view.weights, **weights}
        names = {node.name: node for node in view.graph.nodes}
        seen: dict[str, torch.Tensor] = {}
        view.run(
            view.feeds(**batch(name)),
            observe=lambda node, value, seen=seen: seen.__setitem__(node.name, value),
            alias={names[a.name]: names[b.name] for a, b in alias.items()},
        )
        assert set(got) == operands
        assert all(torch.equal(got[node], seen[node.name]) for node in operands)
        weights |= zeroed(program, site, (0, 1))


def test_a_later_start_runs_less() -> None:
    program = traced("bert")
    sites = [s for s in sites_of("bert") if s.kind == "mlp"]
    walk = Walk(program, found("bert"), batch("bert"))
    ran = 0
    plain = program.run

    def counted(feeds: object, *, observe: object, **options: object) -> object:
        def both(node: object, value: object) -> None:
            nonlocal ran
            ran += getattr(node, "op", "") == "call_function" and node not in options["given"]  # type: ignore[operator]
            observe(node, value)  # type: ignore[operator]

        return plain(feeds, observe=both, **options)  # type: ignore[arg-type]

    walk.program = program.clone()
    counts: list[int] = []
    for site in sites:
        ran = 0
        walk.program.__dict__["run"] = counted
        walk.values({site.consumers[0].operand}, {}, site.first)
        counts.append(ran)
    assert counts[2] < counts[0] * 1.5 and sum(counts) < 3 * counts[0] + 60
