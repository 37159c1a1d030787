"""Short distillation: train a compressed program to answer calibration data as the original one does.

No labels are needed: the original program is the teacher (Hinton et al. 2015, arXiv 1503.02531). The weights that are
parameters (`trainable`) are trained in place by AdamW with a warm-up and a cosine, one batch at a time, gradients
clipped to norm one. A part of the batches is held out: when its loss has not fallen for a while, training stops, and
the best weights seen there are the ones that stay, the first ones included. So the result is never worse than the start
on held-out data.

What the teacher says of a batch is computed once and kept, reduced to what the loss needs (`targets`), as long as all
of it fits in ``cache_bytes``; batches beyond that are answered anew each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from ....ir.errors import InputError, PreconditionError, suggest
from ....ir.program import Program
from ....ir.rewrite import Rewriter
from ...base import Batch
from ...fidelity import seeded
from .distill_settings import DistillReport, DistillSettings
from .gradients import Trainer
from .targets import Target, losses, target_of
from .trainable import trainable_weights

_NAME = "distillation"
_DECAY = 0.05  # the cosine ends at this share of the learning rate

Progress = Callable[[Iterable[Any], int | None, str], Iterable[Any]]
Features = Sequence[tuple[fx.Node, fx.Node]]


def distill(
    program: Program,
    teacher: Program,
    batches: Sequence[Batch],
    settings: DistillSettings,
    *,
    trainable: Collection[str] | None = None,
    features: Features = (),
    progress: Progress = lambda items, total, label: items,
) -> DistillReport:
    """Train a program to answer as another one does, in place.

    Args:
        program: what is trained. Its weights get new values under the same names; tied ones stay tied.
        teacher: the original, with the same inputs and outputs. It is not changed.
        batches: named inputs.
        settings: how.
        trainable: names of the weights to train; by default all parameters (`trainable.trainable_weights`), as far as
            the settings' ``embeddings`` says.
        features: pairs of a value of ``program`` and one of ``teacher`` of the same shape that should agree.
        progress: shows a bar.

    Returns:
        What was done.

    Raises:
        PreconditionError: there is nothing to train or no data to train on, gradients do not reach the weights, or the
            data, teacher or program give something that is no number.
        InputError: a name in ``trainable`` is no floating-point weight of the main graph.
    """
    if settings.steps == 0:
        return DistillReport()
    names = _names(program, trainable, settings)
    if not batches:
        raise PreconditionError("distillation needs calibration data", pass_name=_NAME, remedy="pass calibration=")
    run = _Distillation(program, teacher, batches, settings, names, features)
    report = run.train(progress)
    if report.best_step:
        rewriter = Rewriter(program, _NAME)
        for name, weight in run.trainer.weights().items():
            rewriter.weight(name, weight)
    return report


def _names(program: Program, trainable: Collection[str] | None, settings: DistillSettings) -> list[str]:
    if trainable is None:
        found = trainable_weights(program, tables=settings.embeddings)
        if not found:
            raise PreconditionError(
                "nothing to train: no weight of the program is a parameter in floating point",
                pass_name=_NAME,
                expected="linear maps, convolutions, norms or embeddings with floating-point weights",
                remedy="distil before quantising",
            )
        return found
    read = {str(n.target) for n in program.graph.find_nodes(op="get_attr")} & set(program.weights)
    for name in trainable:
        if name not in read:
            raise InputError(f"no weight '{name}' in the main graph{suggest(name, sorted(read))}")
        if not program.weights[name].dtype.is_floating_point:
            raise InputError(f"'{name}' is {program.weights[name].dtype}", expected="a floating-point weight")
    if not trainable:
        raise InputError("trainable is empty", expected="names of weights, or None for all parameters")
    return list(trainable)


class _Distillation:
    """One run of `distill`."""

    def __init__(
        self,
        program: Program,
        teacher: Program,
        batches: Sequence[Batch],
        settings: DistillSettings,
        names: Sequence[str],
        features: Features,
    ) -> None:
        self.settings = settings
        self.program, self.teacher = program, teacher
        self.own = [a for a, _ in features]
        self.theirs = [b for _, b in features]
        self.batches = [dict(program.feeds(**batch)) for batch in batches]
        for feeds in self.batches:
            program.check_feeds(feeds)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.train_set, self.held_set = split(len(self.batches), settings)
        self.trainer = Trainer(program, names)
        self.cache: dict[int, Target] = {}
        self.cached_bytes = 0

    def _target(self, index: int) -> Target:
        if index in self.cache:
            return self.cache[index]
        feeds = self.batches[index]
        seen: dict[fx.Node, Any] = {}
        wanted = set(self.theirs)

        def observe(node: fx.Node, value: Any) -> None:
            if node in wanted:
                seen[node] = value

        outputs = seeded(lambda: self.teacher.run(self.teacher.feeds(**feeds), observe=observe))
        for name, value in outputs.items():
            if isinstance(value, torch.Tensor) and bool(value.isnan().any()):
                raise PreconditionError(
                    f"the teacher's output '{name}' holds NaN for batch {index}",
                    pass_name=_NAME,
                    expected="numbers",
                    remedy="look for NaN or infinity in the calibration data and the weights",
                )
        inner = [seen[node] for node in self.theirs]
        target = target_of(outputs, inner, feeds, self.settings.temperature, self.settings.top_k)
        if not target.logits and not target.values:
            raise PreconditionError("no output is in floating point, so there is nothing to compare", pass_name=_NAME)
        if self.cached_bytes + target.nbytes <= self.settings.cache_bytes:
            self.cache[index] = target
            self.cached_bytes += target.nbytes
        return target

    def _loss(self, index: int) -> torch.Tensor:
        target, feeds = self._target(index), self.batches[index]
        outputs, seen = self.trainer.run(feeds, set(self.own))
        own = [seen[node] for node in self.own]
        outer, inner = losses(outputs, own, target, feeds, self.settings.temperature)
        return outer + self.settings.feature_weight * inner if self.own else outer

    def _held_out_loss(self) -> float:
        with torch.no_grad():
            values = [float(seeded(lambda i=i: self._loss(i))) for i in self.held_set]
        return sum(values) / len(values)

    def train(self, progress: Progress) -> DistillReport:
        """Train, and leave the best weights in the leaves."""
        settings, leaves = self.settings, self.trainer.leaves
        before = self._held_out_loss() if self.held_set else None
        if before is not None and not math.isfinite(before):
            raise _no_number("the held-out loss of the first weights", self.held_set)
        held_out: list[tuple[int, float]] = [] if before is None else [(0, before)]
        best, best_step = before, 0
        kept = [leaf.detach().clone() for leaf in leaves] if before is not None else []
        optimizer = torch.optim.AdamW(leaves, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        train_loss: list[tuple[int, float]] = []
        recent: list[float] = []
        tokens, done, waited, stopped = 0, 0, 0, "steps"
        order: list[int] = []
        for step in progress(range(1, settings.steps + 1), settings.steps, "distillation"):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * schedule(step, settings.steps, settings.warmup)
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for _ in range(settings.batches_per_step):
                order = order or self._shuffled()
                index = order.pop()
                loss = self._loss(index) / settings.batches_per_step
                total += float(loss.detach())
                if not math.isfinite(total):
                    break
                self.trainer.backward(loss)
                tokens += positions(self.batches[index])
            if not math.isfinite(total):
                if step == 1:
                    raise _no_number("the loss", self.train_set)
                stopped = "diverged"
                break
            torch.nn.utils.clip_grad_norm_(leaves, settings.clip)
            optimizer.step()
            done = step
            recent.append(total)
            if step % settings.evaluate_every and step != settings.steps:
                continue
            train_loss.append((step, sum(recent) / len(recent)))
            recent = []
            if best is None:
                continue
            now = self._held_out_loss()
            held_out.append((step, now))
            if now < best:
                best, best_step, waited = now, step, 0
                kept = [leaf.detach().clone() for leaf in leaves]
                continue
            waited += 1
            if waited >= settings.patience or not math.isfinite(now):
                stopped = "patience" if math.isfinite(now) else "diverged"
                break
        if best is None:
            best_step = done
            if not all(bool(leaf.isfinite().all()) for leaf in leaves):
                raise _no_number("a trained weight", self.train_set)
        else:
            with torch.no_grad():
                for leaf, value in zip(leaves, kept, strict=True):
                    leaf.copy_(value)
        return DistillReport(
            steps=done,
            best_step=best_step,
            stopped=stopped,
            tokens=tokens,
            parameters=sum(leaf.numel() for leaf in leaves),
            train_loss=train_loss,
            held_out=held_out,
            held_out_before=before,
            held_out_after=best,
            train_batches=len(self.train_set),
            held_out_batches=len(self.held_set),
            cached=len(self.cache) / len(self.batches),
        )

    def _shuffled(self) -> list[int]:
        places = torch.randperm(len(self.train_set), generator=self.generator).tolist()
        return [self.train_set[place] for place in places]


def split(count: int, settings: DistillSettings) -> tuple[list[int], list[int]]:
    """Which batches `distill` trains on, and which it holds out.

    What is fitted before a distillation (closed forms) should leave the held-out ones alone as well: they could not
    tell afterwards whether training helps.

    Args:
        count: how many batches there are.
        settings: their ``hold_out`` and ``seed`` decide.

    Raises:
        PreconditionError: one is to be held out, and there is one only.
    """
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed)).tolist()
    if not settings.hold_out:
        return order, []
    if count < 2:
        raise PreconditionError(
            "there is one batch only, so none can be held out",
            pass_name=_NAME,
            expected="two batches or more",
            remedy="split the batch, or set hold_out to 0 and train without early stopping",
        )
    held = min(max(1, round(settings.hold_out * count)), count - 1)
    return order[held:], order[:held]


def _no_number(what: str, batches: Sequence[int]) -> PreconditionError:
    return PreconditionError(
        f"{what} is no finite number (calibration batches {', '.join(map(str, sorted(batches)))})",
        pass_name=_NAME,
        expected="finite numbers",
        remedy="look for NaN or infinity in the calibration data and the weights, or lower the learning rate",
    )


def schedule(step: int, steps: int, warmup: int) -> float:
    """The learning rate's factor at a step (from 1): a line up to one, then half a cosine down to a twentieth.

    Args:
        step: which.
        steps: how many there are.
        warmup: how many of them rise; at most half are.
    """
    rising = min(warmup, steps // 2)
    if step <= rising:
        return step / rising
    way = (step - rising) / max(1, steps - rising)
    return _DECAY + (1 - _DECAY) * 0.5 * (1 + math.cos(math.pi * way))


def positions(feeds: Batch) -> int:
    """How many positions a batch has: those that an ``attention_mask`` shows, else the elements of the widest integer
    input, else the examples.
    """
    mask = feeds.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return int((mask != 0).sum())
    tensors = [v for v in feeds.values() if isinstance(v, torch.Tensor) and v.dim()]
    counts = [v.numel() for v in tensors if not v.is_floating_point() and v.dim() > 1]
    return max(counts) if counts else max((len(v) for v in tensors), default=0)


__all__ = ["DistillReport", "DistillSettings", "Features", "distill", "positions", "schedule", "split"]
