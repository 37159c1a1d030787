"""SHRP: heads as experts, one expander after them, and only the most used heads are deployed.

    dense      y = n1(x + o W_o)      z = n2(y + ffn(y))          o: the outputs of all heads
    routed     y = n1(x + (o*g) W_o)  g: each token's choice of heads, by a router, while it is trained
    deployed   y = n1(x)              z = n2(y + E(o'))           o': the kept heads, E: act(o' V + c) U + b

(here with norms after the sums, as in BERT; norms before them stay as well). Two stages:

- ``prune``: inference only. Heads are ranked by usage, the share of tokens for which a head's term of the output
  projection has the largest norm (`usage`), and the least used ones are cut out.
- ``expand``: a router of each block is trained for a few steps with a straight-through estimator (`router`); its most
  used heads stay, and the router goes. The block's output projection and feed-forward layer become one expander
  (`expander`), which starts from a closed form, and the whole is distilled from the program before the pass. With
  ``reads=stream`` the expander reads the stream instead of the heads' outputs alone: the kept heads keep their slices
  of the output projection, and the expander is the old layer made narrower (`narrow`).

Of BERT-base one head of 64 and one expander 64 -> 3072 -> 768 in each layer leave 56.95 of 109.48 million parameters.

Source: SHRP. Its paper was read in summary only, and without its code: the form of the expander is derived from the
parameter counts that it reports, and the closed forms and ``reads=stream`` are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from ...ir.errors import PipelineError, PreconditionError
from ...ir.program import Program
from ..base import Case, Context, Effect, Pass, Prop, Stats, option, same_outputs
from ..search.apply import apply_plan
from ..search.compensation.distill import DistillSettings, distill, split
from ..search.plan import PARTIAL, Decision, Plan
from ..search.sites import ChannelSite
from .blocks import HeadBlock, find_sites, head_blocks
from .expander import expand
from .narrow import cut_units, narrow
from .observed import Observed, twin
from .planted import loud_head_case
from .router import trained_usage
from .usage import head_usage, most_used

_LOOK = "`graphlathe dump --format tree MODEL` shows what was found; spelled-out attention is found after 'raise'"


@dataclass(frozen=True, kw_only=True)
class Shrp(Pass):
    """Keep the most used attention heads, and put one expander in place of the layers after them (SHRP).

    Raises:
        PipelineError: both ``heads`` and ``share`` are given.
        PreconditionError: no heads that can be cut, no block of the needed form, a block that does not exist, no
            calibration data, or data that gives no finite numbers.
    """

    name: ClassVar[str] = "shrp"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    needs: ClassVar[frozenset[Prop]] = frozenset({Prop.SITES})
    paper: ClassVar[str] = "SHRP (read in summary)"

    stage: str = option("prune", choices=("prune", "expand"), help="cut heads only, or put an expander after them, too")
    heads: int | None = option(None, ge=1, help="heads (groups that share keys) to keep in each block; 1 if no share")
    share: float | None = option(None, gt=0, le=1, help="share of each block's heads to keep, at least one")
    blocks: tuple[int, ...] | None = option(None, ge=0, help="the blocks to change, counted over all streams; all")
    reads: str = option("heads", choices=("heads", "stream"), help="what the expander reads")
    width: int | None = option(None, gt=0, help="hidden units of the expander; as many as the layer had")
    router_steps: int = option(50, ge=0, help="training steps of the routers; 0 ranks heads as stage prune does")
    steps: int = option(300, ge=0, help="steps of distillation; 0 for the closed form alone")
    learning_rate: float = option(1e-3, gt=0, help="the highest learning rate of both trainings")
    batches_per_step: int = option(1, ge=1, help="calibration batches for one training step")
    feature_weight: float = option(
        1.0, ge=0, help="of the streams after the blocks beside the outputs, in the distillation; 0 for outputs alone"
    )
    seed: int = option(0, ge=0, help="of the order of batches")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None and self.share is not None:
            raise PipelineError(
                f"'{self.name}' got both heads and share", expected="one of them", remedy="leave one of them out"
            )

    def check(self, program: Program, ctx: Context) -> None:
        """Refuse programs without attention, blocks that do not exist, and missing data."""
        found = ctx.structure(program)
        if self.stage == "expand" and not found.attention:
            raise PreconditionError("no attention was found", pass_name=self.name, remedy=_LOOK)
        count = sum(len(stream.blocks) for stream in found.streams)
        for index in self.blocks or ():
            if index >= count:
                raise PreconditionError(
                    f"there is no block {index}", pass_name=self.name, expected=f"blocks 0 to {count - 1}"
                )
        if not ctx.calibration and not self._keeps_all:
            raise PreconditionError(
                "the ranking of heads needs calibration data",
                pass_name=self.name,
                remedy="pass calibration= (or --calibration)",
            )

    @property
    def _keeps_all(self) -> bool:
        return self.stage == "prune" and self.share == 1.0

    def _keep(self, site: ChannelSite) -> int:
        wanted = self.heads or 1 if self.share is None else max(1, round(self.share * site.size))
        return min(wanted, site.size)

    def run(self, program: Program, ctx: Context) -> Stats:
        """Rank, cut, and (in stage ``expand``) rewrite and train."""
        stats = Stats()
        if self._keeps_all:
            stats.notes.append("every head stays")
            self._write(program, self._plan(program, [], stats), stats)
            return stats
        found = ctx.structure(program)
        sites = find_sites(program, found)
        if self.stage == "prune":
            stats.misses |= sites.reasons
            chosen = [s for s in sites.heads if self.blocks is None or s.block in self.blocks]
            stats.attempts = len(chosen) + sum(sites.reasons.values())
            if not chosen:
                # Heads are found by their channels, also where nobody knows yet that they belong to an attention.
                none = "none lies in these blocks" if sites.heads else "no attention was found"
                raise PreconditionError(
                    f"no attention's heads can be cut: {next(iter(sites.reasons), none)}",
                    pass_name=self.name,
                    remedy=_LOOK,
                )
            plan = self._prune(program, chosen, self._usage(program, chosen, ctx), ctx, stats)
            self._write(program, plan, stats)
            return stats
        blocks = head_blocks(program, found, sites, stats, self.blocks)
        if not blocks:
            raise PreconditionError(
                f"no block has the form that is needed: {next(iter(stats.misses), 'no block was chosen')}",
                pass_name=self.name,
                expected="blocks of a self-attention and then a feed-forward layer",
                remedy="use stage=prune",
            )
        teacher = program.clone()
        batches = ctx.calibration or ()
        usage = self._usage(program, [block.heads for block in blocks], ctx)
        if self.router_steps:
            counts = [self._keep(block.heads) for block in blocks]
            settings = self._settings(self.router_steps, ctx)
            usage, report = trained_usage(program, teacher, blocks, counts, usage, batches, settings)
            self._check_numbers([block.heads for block in blocks], usage)
            stats.plan["router"] = report.as_dict()
        plan = self._prune(program, [block.heads for block in blocks], usage, ctx, stats)
        self._expand(program, teacher, blocks, ctx, stats)
        features = [(block.block.end, twin(teacher, block.block.end)) for block in blocks]
        settings = self._settings(self.steps, ctx)
        report = distill(program, teacher, batches, settings, features=features, progress=ctx.progress)
        stats.plan["distillation"] = report.as_dict()
        self._write(program, replace(plan, compensation=PARTIAL), stats)
        stats.notes.append("the plan holds the heads that went: expanders and training are not in it")
        return stats

    def _settings(self, steps: int, ctx: Context) -> DistillSettings:
        # A single batch cannot be held out.
        single = len(ctx.calibration or ()) < 2
        return DistillSettings(
            steps=steps,
            learning_rate=self.learning_rate,
            batches_per_step=self.batches_per_step,
            hold_out=0.0 if single else 0.1,
            feature_weight=self.feature_weight,
            seed=self.seed,
        )

    def _usage(self, program: Program, sites: Sequence[ChannelSite], ctx: Context) -> list[torch.Tensor]:
        usage = head_usage(program, sites, ctx.calibration or (), ctx.progress)
        self._check_numbers(sites, usage)
        return usage

    def _check_numbers(self, sites: Sequence[ChannelSite], usage: Sequence[torch.Tensor]) -> None:
        for site, found in zip(sites, usage, strict=True):
            if bool(found.isnan().any()):
                raise PreconditionError(
                    f"the usage of the {site.label} is not a number",
                    pass_name=self.name,
                    node=site.consumers[0].node.name,
                    expected="finite numbers",
                    remedy="look for NaN or infinity in the calibration data and the weights",
                )

    def _prune(
        self, program: Program, sites: Sequence[ChannelSite], usage: Sequence[torch.Tensor], ctx: Context, stats: Stats
    ) -> Plan:
        """Cut all heads but the most used ones of each site."""
        routed = self.stage == "expand" and self.router_steps > 0
        rows: list[dict[str, Any]] = []
        decisions: list[Decision] = []
        for site, used in zip(sites, usage, strict=True):
            kept, scores = most_used(used, self._keep(site)), used.tolist()
            removed = tuple(head for head in range(site.size) if head not in kept)
            why = "every head stays" if not removed else f"lowest {'routed' if routed else 'top-1'} usage"
            rows.append({"block": site.block, "unit": site.group.unit, "kept": kept, "usage": scores})
            decisions.append(
                Decision(site.kind, site.index, site.label, site.block, site.size, removed, "", why, tuple(scores))
            )
        plan = self._plan(program, decisions, stats)
        stats.notes += apply_plan(program, plan, ctx, self.name).notes
        stats.plan |= {"stage": self.stage, "heads": rows}
        stats.hits = len(plan.changes) if self.stage == "prune" else len(sites)
        return plan

    def _plan(self, program: Program, decisions: Sequence[Decision], stats: Stats) -> Plan:
        budget = {"unit": "params", "before": program.parameter_count}
        blocked = dict(stats.misses)
        return Plan(tuple(decisions), self.to_text(), program=program.fingerprint(), budget=budget, blocked=blocked)

    def _write(self, program: Program, plan: Plan, stats: Stats) -> None:
        stats.plan |= plan.with_budget(after=program.parameter_count).to_json()

    def _expand(
        self, program: Program, teacher: Program, blocks: Sequence[HeadBlock], ctx: Context, stats: Stats
    ) -> None:
        """Rewrite the blocks in order, each fitted on what the ones before it give now."""
        batches = list(ctx.calibration or ())
        if self.steps:
            # What the distillation holds out must be new to the closed forms, too, or it would prefer them to training.
            batches = [batches[index] for index in split(len(batches), self._settings(self.steps, ctx))[0]]
        now, dense = (Observed(p, batches) for p in (program, teacher))
        rows: list[dict[str, Any]] = []
        kept: list[tuple[HeadBlock, Sequence[int]]] = []
        for block in ctx.progress(blocks, len(blocks), "closed forms"):
            now.advance(block.block.start)
            dense.advance(twin(teacher, block.block.start))
            if self.reads == "heads":
                width = self.width or block.layer.width
                left = expand(now, dense, block, width)
                rows.append({"block": block.index, "width": width, "unexplained": left})
            elif block.hidden is None:
                stats.miss("its hidden units cannot be cut, so the layer stays as it is", block.block.end)
            else:
                width = min(self.width or block.hidden.size, block.hidden.size)
                fit = narrow(now, dense, block, width)
                kept.append((block, fit.units))
                rows.append({"block": block.index, "width": width, "unexplained": fit.mlp})
        cut_units(program, kept)
        stats.plan["expanders"] = rows

    def ensure(self, before: Program, program: Program, stats: Stats) -> None:
        """The interface must be untouched."""
        same_outputs(before, program, self.name)

    @classmethod
    def neutral(cls) -> Self:
        """With every head kept, the prune stage is the baseline."""
        return cls(stage="prune", share=1.0)

    @classmethod
    def planted(cls) -> Case:
        """One head of four writes into the stream, the others write almost nothing; it must be the one that stays."""
        return loud_head_case(cls(stage="prune", heads=1))
