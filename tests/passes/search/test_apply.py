"""Plans carried out: against cutting by hand, twice, from other sources, and refused where they do not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from graphlathe.ir.axes import cut
from graphlathe.ir.axes.rescale import rescale_norms
from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.structure import structure
from graphlathe.ir.verify import relative_error, verify
from graphlathe.passes.base import Context
from graphlathe.passes.canonical.raise_all import RaiseAll
from graphlathe.passes.search.apply import apply_plan
from graphlathe.passes.search.plan import Decision, Plan
from graphlathe.passes.search.sites import KINDS, ChannelSite, channel_sites
from tests.passes.search.small_models import batch, context, same, sites_of
from tests.zoo_files import from_our_file
from tests.zoo_programs import traced, zoo_parameters


def decision(site: ChannelSite, *removed: int) -> Decision:
    return Decision(site.kind, site.index, site.label, site.block, site.size, removed)


def mixed(name: str, kinds: tuple[str, ...], compensation: str = "none") -> Plan:
    """The first and the last but one atom of every site."""
    sites = [site for site in sites_of(name) if site.kind in kinds]
    return Plan(tuple(decision(s, *sorted({0, s.size - 2})) for s in sites), compensation=compensation)


def names_of(site: ChannelSite) -> frozenset[tuple[str, str, int]]:
    return frozenset((site.kind, member.weight, member.dim) for member in site.group.members)


@pytest.mark.parametrize("name", zoo_parameters(["llama", "gpt2", "plain_resnet"]))
def test_overlapping_sites_equal_cutting_one_after_the_other(name: str) -> None:
    kinds = ("mlp", "stream", "heads", "value-channels", "qk-channels", "channels")
    sites = [site for site in sites_of(name) if site.kind in kinds]
    plan = Plan(tuple(decision(site, 0) for site in sites))
    at_once = traced(name).clone()
    apply_plan(at_once, plan, Context(), "test")
    verify(at_once, 2)
    by_hand = traced(name).clone()
    # Any order will do; this one is not that of the plan.
    for site in reversed(sites):
        again = channel_sites(by_hand, structure(by_hand), kinds)[0]
        group = next(s.group for s in again if names_of(s) == names_of(site))
        keep = list(range(1, site.size))
        if not group.zeroable:
            rescale_norms(by_hand, group, keep, Rewriter(by_hand, "test"))
        cut(by_hand, group, keep)
    assert at_once.parameter_count == by_hand.parameter_count < traced(name).parameter_count
    same(at_once.run(at_once.feeds(**batch(name))), by_hand.run(by_hand.feeds(**batch(name))))


def test_sites_that_overlap_in_a_norm_are_found_again_after_it_was_rescaled() -> None:
    """The heads of a state space layer, and the channels inside each, are all normed together."""
    program = traced("mamba2").clone()
    RaiseAll().run(program, Context())
    sites, _ = channel_sites(program, structure(program), ("channels",))
    norms = [{m.weight for m in site.group.members if m.weight.endswith("norm.weight")} for site in sites]
    assert any(a & b for i, a in enumerate(norms) for b in norms[:i])
    changed = program.clone()
    apply_plan(changed, Plan(tuple(decision(site, 0) for site in sites)), Context(), "test")
    verify(changed, 2)
    assert any(name.endswith("norm.rescaled") for name in changed.used_weights())
    by_hand = program.clone()
    for site in reversed(sites):
        here = channel_sites(by_hand, structure(by_hand), ("channels",))[0]
        same_names = [s.group for s in here if {m for m in names_of(s) if m[1] in program.weights} == names_of(site)]
        group = next(group for group in same_names if group.size == site.size)
        keep = list(range(1, site.size))
        if not group.zeroable:
            rescale_norms(by_hand, group, keep, Rewriter(by_hand, "test"))
        cut(by_hand, group, keep)
    sizes = [{n: tuple(p.weights[n].shape) for n in program.used_weights()} for p in (changed, by_hand, program)]
    assert sizes[0] == sizes[1] != sizes[2]
    same(changed.run(changed.feeds(**batch("mamba2"))), by_hand.run(by_hand.feeds(**batch("mamba2"))))


@pytest.mark.parametrize("compensation", ["none", "bias", "least-squares", "mask-tuning"])
@pytest.mark.parametrize("name", zoo_parameters(["llama", "gpt2"]))
def test_applying_twice_gives_equal_programs(name: str, compensation: str) -> None:
    plan = Plan.from_json(mixed(name, ("mlp", "value-channels"), compensation).to_json())
    prints: list[str] = []
    for _ in range(2):
        program = traced(name).clone()
        result = apply_plan(program, plan, context(name, 2), "test")
        verify(program, 2)
        assert result.cut == len(plan.changes) and not result.skipped
        prints.append(program.fingerprint())
    assert prints[0] == prints[1] != traced(name).fingerprint()


@pytest.mark.parametrize("name", zoo_parameters(["llama", "bert", "plain_resnet"]))
def test_a_plan_from_pytorch_applies_to_the_onnx_file(name: str) -> None:
    """Where both have the same sites: they are told by kind and number, never by names."""
    imported = from_our_file(name)
    there = channel_sites(imported, structure(imported), KINDS)[0]
    kinds = ("stream", "mlp", "heads", "channels")
    # Channels inside the heads of attention that is spelled out are channels like others.
    agree = [(s.kind, s.index, s.size) for s in sites_of(name) if s.kind in kinds]
    assert [(s.kind, s.index, s.size) for s in there if (s.kind, s.index, s.size) in agree] == agree
    plan = mixed(name, kinds)
    ours, theirs = traced(name).clone(), imported.clone()
    apply_plan(ours, plan, Context(), "test")
    apply_plan(theirs, plan, Context(), "test")
    feeds = batch(name)
    a, b = ours.run(ours.feeds(**feeds)), theirs.run(theirs.feeds(**feeds))
    got, want = list(b.values()), list(a.values())
    assert relative_error(dict(enumerate(got)), dict(enumerate(want))) < 1e-4  # pyright: ignore[reportArgumentType]
    before = traced(name).run(traced(name).feeds(**feeds))
    assert not torch.allclose(next(iter(a.values())), next(iter(before.values())), atol=1e-4)


def test_another_model_is_refused() -> None:
    program = traced("bert").clone()
    before = program.to_text()
    with pytest.raises(PreconditionError, match=r"does not fit: 'mlp of block 0' \(mlp 5\) has none here") as error:
        apply_plan(program, mixed("llama", ("mlp",)), Context(), "test")
    assert "apply a plan to the model" in str(error.value)
    wrong = Plan((replace(mixed("bert", ("mlp",)).decisions[0], kind="mpl"),))
    with pytest.raises(PreconditionError, match=r"unknown kind 'mpl' \(did you mean 'mlp'\?\)"):
        apply_plan(program, wrong, Context(), "test")
    site = next(s for s in sites_of("bert") if s.kind == "mlp")
    with pytest.raises(PreconditionError, match="has 64 units here"):
        apply_plan(program, Plan((replace(decision(site, 1), units=32),)), Context(), "test")
    with pytest.raises(PreconditionError, match="there is no block 7"):
        apply_plan(program, Plan((Decision("drop-block", 7, "", None, 1, (0,)),)), Context(), "test")
    with pytest.raises(PreconditionError, match="has 1 unit here"):
        apply_plan(program, Plan((Decision("drop-block", 0, "", None, 3, (2,)),)), Context(), "test")
    with pytest.raises(PreconditionError, match="compensation 'magic'"):
        apply_plan(program, Plan((), compensation="magic"), Context(), "test")
    assert program.to_text() == before


def test_nothing_left_and_blocked_units_are_refused() -> None:
    program = traced("plain_resnet").clone()
    before = program.to_text()
    site = next(s for s in sites_of("plain_resnet") if s.kind == "channels")
    with pytest.raises(PreconditionError, match=f"leaves nothing of '{site.label}'"):
        apply_plan(program, Plan((decision(site, *range(site.size)),)), Context(), "test")
    with pytest.raises(PreconditionError, match="block 1 cannot be dropped: the stream changes"):
        apply_plan(program, Plan((Decision("drop-block", 1, "", 1, 1, (0,)),)), Context(), "test")
    assert program.to_text() == before


def test_compensation_needs_data_and_an_empty_plan_does_nothing() -> None:
    program = traced("bert").clone()
    with pytest.raises(PreconditionError, match="needs calibration data"):
        apply_plan(program, mixed("bert", ("mlp",), "bias"), Context(), "test")
    program = traced("bert").clone()
    nothing = Plan(tuple(replace(d, removed=()) for d in mixed("bert", ("mlp",)).decisions), compensation="bias")
    assert apply_plan(program, nothing, Context(), "test").done == 0
    assert program.fingerprint() == traced("bert").fingerprint()


def test_a_site_in_a_dropped_branch_is_not_compensated() -> None:
    """What reads it is never run, so there is nothing to fit."""
    site = next(s for s in sites_of("llama") if s.kind == "mlp" and s.block == 1)
    other = next(s for s in sites_of("llama") if s.kind == "mlp" and s.block == 2)
    dropped = Decision("drop-mlp", 1, "", 1, 1, (0,))
    plan = Plan((decision(site, 1), decision(other, 1), dropped), compensation="least-squares")
    program, alone = traced("llama").clone(), traced("llama").clone()
    apply_plan(program, plan, context("llama"), "test")
    apply_plan(alone, replace(plan, decisions=(decision(other, 1), dropped)), context("llama"), "test")
    assert program.fingerprint() == alone.fingerprint()


def test_only_what_is_fitted_gets_a_bias() -> None:
    """The stream's readers cannot be fitted, since a norm counts its channels."""
    site = next(s for s in sites_of("llama") if s.kind == "stream")
    program = traced("llama").clone()
    result = apply_plan(program, Plan((decision(site, 0),), compensation="least-squares"), context("llama"), "test")
    assert sum(result.skipped.values()) == len(site.consumers)
    assert not [name for name in program.used_weights() if name.endswith("bias")]


def test_compensation_helps() -> None:
    def error(program: Program) -> float:
        want = traced("llama").run(batch("llama"))["logits"]
        return float((program.run(batch("llama"))["logits"] - want).square().sum())

    errors: dict[str, float] = {}
    for compensation in ("none", "bias", "least-squares"):
        plan, program = mixed("llama", ("mlp",), compensation), traced("llama").clone()
        plan = replace(plan, decisions=tuple(replace(d, removed=tuple(range(0, 64, 4))) for d in plan.decisions))
        apply_plan(program, plan, context("llama", 1), "test")
        errors[compensation] = error(program)
    assert np.isfinite(list(errors.values())).all()
    assert errors["least-squares"] < 0.5 * errors["none"] and errors["bias"] < errors["none"]
