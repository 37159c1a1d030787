"""Short distillation: let a compressed model learn from the one that it was made of.

A few hundred steps on the calibration data, without labels: the student's outputs are pulled to the teacher's.

    loss = KL(teacher || student) where an output looks like logits, else the squared error relative to the outputs

A part of the data is held out; training stops when its loss no longer falls, and the best weights seen there stay, so
that the result is never worse than the start on what was held out. The teacher is the model that the pipeline was
given, so ``shortgpt{ratio=0.2},distill{steps=300}`` heals what dropping did.

Source: Hinton et al. 2015 (arXiv 1503.02531).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from ...ir.errors import PostconditionError, PreconditionError
from ...ir.program import Program
from ...ir.weights import Weight
from ..base import Case, Context, Effect, Pass, Stats, option
from ..channels.planted import model_case
from ..fidelity import output_distance
from ..search.compensation.distill import distill
from ..search.compensation.distill_settings import DistillReport, DistillSettings


@dataclass(frozen=True, kw_only=True)
class Distill(Pass):
    """Train the weights for a few steps to answer as the original model does (Hinton et al., arXiv 1503.02531).

    Raises:
        PreconditionError: there is no original to learn from, no calibration data, or an operator has no gradient.
    """

    name: ClassVar[str] = "distill"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    paper: ClassVar[str] = "Hinton et al. 2015, arXiv 1503.02531"

    steps: int = option(300, ge=0, help="optimizer steps at most")
    learning_rate: float = option(3e-4, gt=0, help="highest learning rate of AdamW")
    batches_per_step: int = option(1, ge=1, help="calibration batches averaged for one step")
    temperature: float = option(1.0, gt=0, help="divides logits")
    hold_out: float = option(0.1, ge=0, lt=1, help="share of the batches kept aside to decide when to stop")
    evaluate_every: int = option(25, ge=1, help="steps between two looks at what is held out")
    patience: int = option(4, ge=1, help="looks without improvement after which training stops")
    embeddings: bool = option(False, help="train embedding tables, and output maps tied to them, as well")
    seed: int = option(0, ge=0, help="order of the data")

    def check(self, program: Program, ctx: Context) -> None:
        """Refuse to start without a teacher or data."""
        if not self.steps:
            return
        if not ctx.calibration:
            raise PreconditionError(
                "it learns from calibration data", pass_name=self.name, remedy="pass calibration= (or --calibration)"
            )
        if ctx.original is None:
            raise PreconditionError(
                "there is no original model to learn from", pass_name=self.name, remedy="run it in a pipeline"
            )

    def run(self, program: Program, ctx: Context) -> Stats:
        """Train in place."""
        if not self.steps:
            return Stats(notes=["no steps: nothing to do"])
        assert ctx.original is not None
        settings = replace(
            DistillSettings(),
            steps=self.steps,
            learning_rate=self.learning_rate,
            batches_per_step=self.batches_per_step,
            temperature=self.temperature,
            hold_out=self.hold_out,
            evaluate_every=self.evaluate_every,
            patience=self.patience,
            embeddings=self.embeddings,
            seed=self.seed,
            warmup=min(20, self.steps),
        )
        try:
            report = distill(program, ctx.original, ctx.calibration or (), settings, progress=ctx.progress)
        except PreconditionError as error:
            error.pass_name = self.name  # other passes distill as well
            raise
        stats = Stats(hits=1 if report.best_step else 0, attempts=1, plan={"distillation": report.as_dict()})
        stats.notes.append(_summary(report))
        return stats

    def ensure(self, before: Program, program: Program, stats: Stats) -> None:
        """Weights may get other numbers, and nothing else may change."""
        old, new = ({name: (w.shape, w.dtype) for name, w in p.weights.items()} for p in (before, program))
        if old != new:
            raise PostconditionError("weights changed their shape or type", pass_name=self.name)

    @classmethod
    def neutral(cls) -> Self:
        """No steps are the baseline."""
        return cls(steps=0)

    @classmethod
    def planted(cls) -> Case:
        """One weight of a model is disturbed; learning from the undisturbed model must bring the outputs back."""
        original, batches = model_case()
        damaged = original.clone()
        name = max(damaged.weights, key=lambda n: damaged.weights[n].numel)
        generator = torch.Generator().manual_seed(3)
        value = damaged.weights[name].tensor()
        damaged.weights[name] = Weight.from_tensor(value + 0.3 * torch.randn(value.shape, generator=generator))

        def found(after: Program, stats: Stats) -> bool:
            errors = [
                sum(output_distance(p.run(batch), original.run(batch), batch) for batch in batches)
                for p in (damaged, after)
            ]
            return errors[1] < 0.05 * errors[0]

        settings = cls(steps=200, learning_rate=1e-2, hold_out=0.0, evaluate_every=50)
        return Case(settings, damaged, batches, found, original)


def _summary(report: DistillReport) -> str:
    held = ""
    if report.held_out_before is not None and report.held_out_after is not None:
        held = f"; held-out loss {report.held_out_before:.4g} -> {report.held_out_after:.4g}"
    return f"{report.steps} steps, {report.tokens:,} positions, best at step {report.best_step}{held}"
