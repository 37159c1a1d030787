"""Carrying out decisions about the weights of linear layers.

The weights are solved again from the texts of the decisions, on the inputs that the unchanged program gives the
layers: the same program, calibration data and plan give the same weights. So this comes before any other change.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.errors import InputError, PreconditionError
from ...ir.program import Program
from ...ir.rewrite import Rewriter
from ..base import Context
from .consumers import with_weight_matrix
from .linear_codes import store_codes
from .linear_correction import put_beside
from .linear_factors import split
from .linear_sites import LinearSite, linear_sites
from .linear_solve import Solved, correction_params, counted_bytes, executed_macs, solve
from .linear_texts import Bits, LinearLevel, LowRank, Sparse, correction_of, parse
from .local.factorize import Factors
from .local.round_to_nearest import Quantized
from .plan import LINEAR, Decision


def apply_linear(
    program: Program, decisions: Sequence[Decision], ctx: Context, made_by: str, rewriter: Rewriter | None = None
) -> list[str]:
    """Change the weights of linear layers as decided, in place.

    Pruned weights keep their shape and hold zeros; codes are stored packed, with the operators that expand them; two
    factors become two layers. Corrections are two more layers beside the changed one.

    Args:
        program: the program, before any other change of a plan.
        decisions: of kind ``linear``; those without a level change nothing.
        ctx: calibration data.
        made_by: the pass's name.
        rewriter: of the program; None: a new one.

    Returns:
        Notes on what was stored, and what it costs on disk and when it runs.

    Raises:
        PreconditionError: a decision does not fit the program, or calibration data is missing or not finite.
    """
    levels = {d.index: d for d in decisions if d.kind == LINEAR and d.level}
    if not levels:
        return []
    # A plan may have been made with layers outside of the blocks.
    sites = {site.index: site for site in linear_sites(program, ctx.structure(program), outside=True)[0]}
    wanted: dict[int, list[LinearLevel]] = {}
    for index, decision in levels.items():
        wanted[index] = [_level(sites.get(index), decision, made_by)]
    chosen = [sites[index] for index in wanted]
    notes = _notes(program, chosen, wanted)
    # All are solved before any is changed: what a layer reads must not depend on what was done to others.
    results = list(solve(program, chosen, wanted, ctx))
    rewriter = Rewriter(program, made_by) if rewriter is None else rewriter
    for solved in results:
        _store(rewriter, solved)
    rewriter.erase_dead()
    return notes


def _level(site: LinearSite | None, decision: Decision, made_by: str) -> LinearLevel:
    if site is None:
        raise PreconditionError(
            f"the plan does not fit: there is no linear layer {decision.index} that can be changed",
            pass_name=made_by,
            remedy="apply a plan to the model (and after the passes) that it was made for",
        )
    try:
        return parse(decision.level, site.outputs, site.inputs)
    except InputError as error:
        raise PreconditionError(
            f"the plan does not fit '{site.label}': {error.message}",
            pass_name=made_by,
            node=site.consumers[0].node.name,
            expected=error.expected,
            remedy="apply a plan to the model (and after the passes) that it was made for",
        ) from error


def _store(rewriter: Rewriter, solved: Solved) -> None:
    site, stored = solved.site, solved.stored
    if solved.correction is not None:
        put_beside(rewriter, site, solved.correction)
    if isinstance(stored, Quantized):
        store_codes(rewriter, site, stored)
    elif isinstance(stored, Factors):
        split(rewriter, site, stored)
    else:
        rewriter.weight(site.weight, with_weight_matrix(rewriter.program, site.consumers[0], stored))


def _notes(program: Program, sites: Sequence[LinearSite], wanted: dict[int, list[LinearLevel]]) -> list[str]:
    notes: list[str] = []
    for kind in (Sparse, Bits, LowRank):
        pairs = [(s, level) for s in sites for level in wanted[s.index] if isinstance(level, kind)]
        if not pairs:
            continue
        before = sum(program.weights[site.weight].nbytes for site, _ in pairs)
        after = sum(counted_bytes(level, site, program.weights[site.weight].dtype) for site, level in pairs)
        beside = _beside(pairs)
        if kind is Sparse:
            left = sum(level.nonzeros for _, level in pairs if isinstance(level, Sparse))
            dense = before + sum(correction_params(lv, s) * program.weights[s.weight].dtype.itemsize for s, lv in pairs)
            notes.append(
                f"{len(pairs)} linear layers keep {left:,} of {sum(s.size for s, _ in pairs):,} weights{beside}: they "
                f"are stored and run dense, with zeros ({dense:,} bytes; {after:,} in a file with positions instead)"
            )
        elif kind is Bits:
            notes.append(
                f"{len(pairs)} linear layers are stored as packed codes{beside}: {after:,} bytes instead of "
                f"{before:,}; they are expanded when they run"
            )
        else:
            macs = sum(executed_macs(level, site) for site, level in pairs)
            dense = sum(site.size for site, _ in pairs)
            more = " (MORE than before: zeros are multiplied, too)" if macs > dense else ""
            notes.append(
                f"{len(pairs)} linear layers became two each: {macs:,} multiply-adds per row instead of "
                f"{dense:,}{more}; {after:,} bytes instead of {before:,} where zeros are not stored"
            )
    return notes


def _beside(pairs: Sequence[tuple[LinearSite, LinearLevel]]) -> str:
    """What stands beside the weights of these layers; empty if nothing does."""
    corrected = [(site, level) for site, level in pairs if correction_of(level)]
    if not corrected:
        return ""
    numbers = sum(correction_params(level, site) for site, level in corrected)
    ranks = ", ".join(map(str, sorted({correction_of(level) for _, level in corrected})))
    return (
        f", and {len(corrected)} of them have two maps of rank {ranks} beside them ({numbers:,} numbers, and as many "
        "more multiply-adds per row)"
    )
