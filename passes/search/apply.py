"""Carrying out a plan: compensation, cuts, dropped units.

The passes that choose use it as well, so that applying a saved plan gives what choosing gave.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from ...ir.axes import cut_all
from ...ir.axes.rescale import rescale_norms
from ...ir.errors import PreconditionError, suggest
from ...ir.execute import needed
from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ..base import Context
from .biases import give_bias
from .correct import correct
from .left_behind import branches_of, left_for_outputs
from .linear_apply import apply_linear
from .plan import LINEAR, PARTIAL, Decision, Plan
from .refit import METHODS, Cut, refit, why_not_fitted
from .same_site import Uncut
from .sites import KINDS, ChannelSite, channel_sites
from .units import GRANULARITIES, Unit, removable_units, replacements

DROPS = {f"drop-{name}": name for name in GRANULARITIES}
COMPENSATIONS = ("none", *METHODS)


@dataclass
class Applied:
    """What was done.

    Attributes:
        cut: sites that were cut.
        dropped: units that were dropped.
        stored: linear layers whose weights were stored in another form.
        skipped: why consumers were not compensated, with counts.
        notes: lines for the report.
    """

    cut: int = 0
    dropped: int = 0
    stored: int = 0
    skipped: dict[str, int] = field(default_factory=dict[str, int])
    notes: list[str] = field(default_factory=list[str])

    @property
    def done(self) -> int:
        """How many places were changed."""
        return self.cut + self.dropped + self.stored


def apply_plan(
    program: Program, plan: Plan, ctx: Context, made_by: str, *, sequential: bool = True, fit: bool = True
) -> Applied:
    """Carry out a plan, in place.

    Args:
        program: a program that has the places of the plan.
        plan: the plan.
        ctx: calibration data, for a plan with compensation.
        made_by: the pass's name.
        sequential: whether compensation of later layers sees what was done to earlier ones.
        fit: whether to compensate; without, the program has the right size and the wrong weights.

    Raises:
        PreconditionError: the plan is only a part of what its pass did; it names a place that the program does not
            have, or that cannot be cut or dropped; or compensation lacks calibration data.
        VerifyError: as `ir.axes.cut`.
    """
    result = Applied()
    if plan.compensation == PARTIAL:
        raise PreconditionError(
            f"the plan holds only what '{plan.made_by}' removed: what it put in its place, and trained, is not in it",
            pass_name=made_by,
            remedy='run that pass itself; or write "compensation": "none" into the plan, and only that is removed',
        )
    if plan.compensation not in COMPENSATIONS:
        raise PreconditionError(
            f"the plan asks for the compensation '{plan.compensation}'",
            pass_name=made_by,
            expected=f"one of: {', '.join(COMPENSATIONS)}",
        )
    if not plan.changes:
        return result
    rewriter = Rewriter(program, made_by)
    layers = [decision for decision in plan.changes if decision.kind == LINEAR]
    # First: their weights are solved on what the unchanged program reads.
    result.notes += apply_linear(program, layers, ctx, made_by, rewriter)
    result.stored = len(layers)
    others = [decision for decision in plan.changes if decision.kind != LINEAR]
    cuts, units = resolve(program, others, ctx, made_by)
    method = METHODS.get(plan.compensation)
    if method is not None and cuts:
        if method.bias and _give_biases(rewriter, cuts, needed(program.graph, (), replacements(units))):
            cuts, units = resolve(program, others, ctx, made_by)
        if fit:
            found = ctx.structure(program)
            fitted = refit(program, found, cuts, replacements(units), ctx, plan.compensation, sequential=sequential)
            for name, weight in fitted.weights.items():
                rewriter.weight(name, weight)
            result.skipped = fitted.skipped
            result.notes += fitted.notes
    # Units are dropped last: groups hold the names of their operators.
    result.notes += cut_sites(program, cuts, ctx, made_by)
    result.cut = len(cuts)
    branches = branches_of(ctx.structure(program)) if units else {}
    if plan.rank and units:
        corrected, notes = correct(program, units, plan.rank, ctx, rewriter, fit=fit)
        result.notes += [*notes, f"{corrected} maps of rank {plan.rank} in the place of {len(units)} dropped units"]
    else:
        drop(rewriter, units)
        if plan.rank:
            result.notes.append(f"rank={plan.rank} had nothing to do: nothing is dropped whole")
    result.notes += left_for_outputs(program, units, branches)
    result.dropped = len(units)
    return result


def cut_sites(program: Program, cuts: Sequence[Cut], ctx: Context, made_by: str) -> list[str]:
    """Cut sites that were found together, in place; those that cut one dimension of a value one after the other.

    Norms over a stream that is cut go on dividing by the old number of channels where that has a form (RMSNorm), so
    that cutting is zeroing.

    Returns:
        Where cutting is not zeroing, and why.

    Raises:
        PreconditionError: as `ir.axes.cut_all`, or a site is gone after others were cut.
        VerifyError: as `ir.axes.cut`.
    """
    notes: list[str] = []
    uncut = Uncut(program)
    for number, chosen in enumerate(_rounds(cuts)):
        found = _again(program, chosen, uncut, ctx, made_by) if number else chosen
        # Norms that are rescaled add places to their group: those of a site go on describing the uncut program.
        pairs = [(replace(s.group, places=dict(s.group.places)), _kept(s, removed)) for s, removed in found]
        for site, (group, keep) in zip((site for site, _ in found), pairs, strict=True):
            if not group.zeroable and len(keep) < group.size:
                missed = rescale_norms(program, group, keep, Rewriter(program, made_by, group.entry))
                notes += [f"{site.label}: {missed[0]} ({len(missed)}x)"] if missed else []
        cut_all(program, pairs, made_by=made_by)
        for site, removed in chosen:
            uncut.cut(site, list(removed))
    return notes


def drop(rewriter: Rewriter, units: Collection[Unit]) -> None:
    """Replace each unit's value by the value before it, and erase what nothing reads any more."""
    # From the last to the first: what reads a unit that is dropped later on is then read from before both. Numbers do
    # not tell the order, since blocks, attention and MLPs have their own.
    position = {node: i for i, node in enumerate(rewriter.graph.nodes)}
    for unit in sorted(units, key=lambda u: position[u.replaced], reverse=True):
        rewriter.replace(unit.replaced, unit.by, erase=False)
    rewriter.erase_dead()


def resolve(
    program: Program, decisions: Sequence[Decision], ctx: Context, made_by: str
) -> tuple[list[Cut], list[Unit]]:
    """The sites and units that decisions speak of.

    Raises:
        PreconditionError: the program has no such place, or nothing can be removed there.
    """
    known = (*KINDS, *DROPS)
    for decision in decisions:
        if decision.kind not in known:
            raise PreconditionError(
                f"the plan speaks of an unknown kind '{decision.kind}'{suggest(decision.kind, known)}",
                pass_name=made_by,
                expected=f"one of: {', '.join((*known, LINEAR))}",
            )
    found = ctx.structure(program)
    kinds = {d.kind for d in decisions if d.kind in KINDS}
    sites = channel_sites(program, found, kinds)[0] if kinds else []
    by_place = {(site.kind, site.index): site for site in sites}
    units = {
        kind: removable_units(found, name) for kind, name in DROPS.items() if any(d.kind == kind for d in decisions)
    }
    cuts: list[Cut] = []
    dropped: list[Unit] = []
    for decision in decisions:
        if decision.kind in DROPS:
            dropped.append(_unit(units[decision.kind], decision, made_by))
            continue
        site = by_place.get((decision.kind, decision.index))
        if site is None or site.size != decision.units:
            have = "none" if site is None else f"{site.size} units"
            raise PreconditionError(
                f"the plan does not fit: '{decision.label}' ({decision.kind} {decision.index}) has {have} here",
                pass_name=made_by,
                expected=f"{decision.units} units",
                remedy="apply a plan to the model (and after the passes) that it was made for",
            )
        if not decision.kept:
            raise PreconditionError(
                f"the plan leaves nothing of '{decision.label}'",
                pass_name=made_by,
                expected=f"at least one of its {site.size} units stays",
                remedy="drop the branch instead: kind drop-attention or drop-mlp",
            )
        cuts.append((site, decision.removed))
    return cuts, dropped


def _unit(units: Sequence[Unit], decision: Decision, made_by: str) -> Unit:
    if not 0 <= decision.index < len(units):
        raise PreconditionError(
            f"the plan does not fit: there is no {DROPS[decision.kind]} {decision.index}",
            pass_name=made_by,
            expected=f"0 to {len(units) - 1}",
        )
    unit = units[decision.index]
    if decision.units != 1:
        raise PreconditionError(
            f"the plan does not fit: '{decision.label}' ({decision.kind} {decision.index}) has 1 unit here",
            pass_name=made_by,
            expected=f"{decision.units} units",
        )
    if unit.blocked:
        raise PreconditionError(
            f"{unit.label} cannot be dropped: {unit.blocked}", pass_name=made_by, node=unit.replaced.name
        )
    return unit


def _kept(site: ChannelSite, removed: Collection[int]) -> list[int]:
    gone = set(removed)
    return [atom for atom in range(site.size) if atom not in gone]


def _give_biases(rewriter: Rewriter, cuts: Sequence[Cut], alive: Collection[fx.Node]) -> int:
    """Biases for the consumers that will be fitted; returns how many changes that took."""
    before = rewriter.mutations
    given: set[fx.Node] = set()
    for site, removed in cuts:
        for consumer in site.consumers if removed else ():
            fitted = consumer.node in alive and not why_not_fitted(rewriter.program, site, consumer)
            if fitted and consumer.node not in given:
                given.add(consumer.node)  # its description is from before it had a bias
                give_bias(rewriter, consumer)
    return rewriter.mutations - before


def _rounds(cuts: Sequence[Cut]) -> list[list[Cut]]:
    """Cuts that can be made at once: no two of a round cut the same dimension of a value."""
    rounds: list[tuple[set[tuple[str, int]], list[Cut]]] = []
    for cut in cuts:
        places = set(cut[0].group.places)
        for taken, members in rounds:
            if taken.isdisjoint(places):
                taken |= places
                members.append(cut)
                break
        else:
            rounds.append((places, [cut]))
    return [members for _, members in rounds]


def _again(program: Program, cuts: Sequence[Cut], uncut: Uncut, ctx: Context, made_by: str) -> list[Cut]:
    """The same sites in the program as it is now."""
    kinds = {site.kind for site, _ in cuts}
    # Where one key and value head is left, the query heads of every group are the heads.
    sites = channel_sites(program, ctx.structure(program), kinds | {"heads"} if "query-heads" in kinds else kinds)[0]
    known = {uncut.now(site): site for site in sites}
    found: list[Cut] = []
    for site, removed in cuts:
        new = known.get(uncut.before(site))
        if new is None:
            raise PreconditionError(f"{site.label} cannot be cut after the others were", pass_name=made_by)
        found.append((new, removed))
    return found
