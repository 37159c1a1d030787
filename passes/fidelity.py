"""Drift: how far a program's outputs are from those of another one, on data.

Three measures, summed over batches so that no batch's outputs are kept:

- ``kl``: mean KL divergence ``KL(reference || changed)`` of the distributions ``softmax(logits)``, in nats a position;
- ``top1``: share of positions at which both put the same entry first;
- ``relative``: ``|changed - reference| / |reference|`` over all numbers of an output (the worst output's counts).

Nothing in a graph says that an output is logits, so this is decided by name and shape, see `logits_outputs`. Where no
output looks like logits, only ``relative`` is measured. Positions that an ``attention_mask`` of the same shape hides
count in none of the logits measures (`position_mask`). Random operators draw the same numbers in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.program import Program

MIN_CLASSES = 2
"""Fewest entries of the last dimension of an output called ``logits``."""

MIN_UNNAMED_CLASSES = 8
"""Fewest entries of the last dimension of a bare output (a module that returns one tensor) to be taken for logits."""

_AT_A_TIME = 1 << 18
"""Elements; float64 copies of so many stay in the processor's cache, which is several times as fast as larger ones."""
_MASK = "attention_mask"
_SEED = 0


@dataclass(frozen=True)
class Drift:
    """What was measured.

    Attributes:
        relative: relative error, the worst over the outputs.
        kl: nats per position, or None where no output looks like logits.
        top1: share of equal first choices, or None.
        batches: how many batches it was measured on.
        source: ``calibration`` or ``example inputs``.
    """

    relative: float
    kl: float | None = None
    top1: float | None = None
    batches: int = 0
    source: str = "calibration"

    @property
    def headline(self) -> float:
        """The number that a budget called ``drift`` bounds: ``kl`` where there is one, else ``relative``."""
        return self.relative if self.kl is None else self.kl

    def __str__(self) -> str:
        if self.kl is None:
            return f"rel {self.relative:.2g}"
        return f"KL {self.kl:.3g}, top-1 {self.top1:.1%}"


def logits_outputs(outputs: Mapping[str, Any]) -> list[str]:
    """The outputs that hold unnormalised log-probabilities in their last dimension.

    Those whose name ends in ``logits``; or the one output of a module that returns a bare tensor (then it is called
    ``output``), if it is floating, of rank 2 or 3 and at least `MIN_UNNAMED_CLASSES` wide.
    """
    found: list[str] = []
    for name, value in outputs.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
            continue
        named = name.rpartition(".")[2].lower().endswith("logits")
        bare = name == "output" and len(outputs) == 1 and value.dim() <= 3 and value.shape[-1] >= MIN_UNNAMED_CLASSES
        # Segmentation and detection heads call [batch, classes, height, width] logits, too: not the last dimension.
        if (named and value.dim() <= 3 and value.shape[-1] >= MIN_CLASSES) or bare:
            found.append(name)
    return found


class DriftMeter:
    """Adds up the distance between pairs of outputs."""

    def __init__(self, source: str = "calibration") -> None:
        self.source = source
        self.batches = 0
        self._kl = 0.0
        self._same = 0
        self._positions = 0
        self._error: dict[str, float] = {}
        self._norm: dict[str, float] = {}

    def add(
        self,
        changed: Mapping[str, Any],
        reference: Mapping[str, Any],
        batch: Mapping[str, Any] | None = None,
    ) -> None:
        """Add one batch.

        Args:
            changed: outputs of the changed program, by name.
            reference: outputs of the program it is compared with.
            batch: the inputs they answer; a mask among them says which positions of the logits count.
        """
        self.batches += 1
        for name, want in reference.items():
            got = changed[name]
            if not isinstance(want, torch.Tensor):
                want, got = (
                    torch.as_tensor(want, dtype=torch.float64),
                    torch.as_tensor(got, dtype=torch.float64),
                )
            error, norm = squared_error(got, want)
            self._error[name] = self._error.get(name, 0.0) + error
            self._norm[name] = self._norm.get(name, 0.0) + norm
        for name in logits_outputs(reference):
            self._add_logits(changed[name], reference[name], position_mask(batch or {}, reference[name].shape[:-1]))

    def _add_logits(self, changed: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None) -> None:
        width = reference.shape[-1]
        got, want = changed.reshape(-1, width), reference.reshape(-1, width)
        if mask is not None:
            kept = mask.reshape(-1) != 0
            got, want = got[kept], want[kept]
        step = max(1, _AT_A_TIME // width)
        for start in range(0, len(want), step):
            p = torch.log_softmax(want[start : start + step].double(), -1)
            q = torch.log_softmax(got[start : start + step].double(), -1)
            # An entry that both rule out (-inf minus -inf) contributes nothing.
            terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
            self._kl += float(terms.sum())
            self._same += int((p.argmax(-1) == q.argmax(-1)).sum())
        self._positions += len(want)

    def result(self) -> Drift:
        """What was measured so far."""
        ratios = [_ratio(self._error[name], self._norm[name]) for name in self._error]
        # `max` would lose a NaN that does not come first.
        relative = math.nan if any(map(math.isnan, ratios)) else max(ratios, default=0.0)
        if not self._positions:
            return Drift(relative, batches=self.batches, source=self.source)
        kl = max(self._kl / self._positions, 0.0) if not math.isnan(self._kl) else math.nan
        return Drift(relative, kl, self._same / self._positions, self.batches, self.source)


def _ratio(error: float, norm: float) -> float:
    if error == 0:
        return 0.0
    return math.sqrt(error / norm) if norm > 0 else math.inf


def squared_error(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """``(|got - want|^2, |want|^2)`` in float64; equal entries (infinities and NaNs included) differ by nothing."""
    if got.shape != want.shape:
        return math.inf, 1.0
    if want.is_complex():
        got, want = torch.view_as_real(got), torch.view_as_real(want)
    error = norm = 0.0
    got, want = got.reshape(-1), want.reshape(-1)
    for start in range(0, len(want), _AT_A_TIME):
        a, b = (
            got[start : start + _AT_A_TIME].double(),
            want[start : start + _AT_A_TIME].double(),
        )
        plain_error, plain_norm = float((a - b).square_().sum()), float(torch.dot(b, b))
        if math.isfinite(plain_error + plain_norm):
            error, norm = error + plain_error, norm + plain_norm
            continue
        difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, a - b)
        error += float(difference.square().sum())
        norm += float(torch.where(b.isfinite(), b, 0.0).square().sum())
    return error, norm


def position_mask(batch: Mapping[str, Any], shape: Sequence[int], *, inside: bool = False) -> torch.Tensor | None:
    """Which positions of ``[batch, tokens]`` count: the ``attention_mask`` of that shape; None where all do.

    A model with a decoder of its own (inputs called ``decoder_...``) has two kinds of positions, which equal shapes
    would confuse: there, outputs are masked by the ``decoder_attention_mask``, and values inside by nothing. Values
    inside may have both axes in one, ``[batch * tokens]``.

    Args:
        batch: the inputs.
        shape: of the value without its last dimension.
        inside: whether the value is one inside the model, rather than an output.
    """
    mask = None if inside and _has_decoder(batch) else _output_mask(batch)
    if mask is not None and inside and torch.Size(shape) == (mask.numel(),):
        mask = mask.reshape(-1)
    return mask if mask is not None and mask.shape == torch.Size(shape) else None


def counts(batch: Mapping[str, Any]) -> bool:
    """Whether any position of a batch's outputs counts: a mask may hide them all."""
    mask = _output_mask(batch)
    return mask is None or bool(mask.any())


def _output_mask(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """The mask of the positions of the outputs, [batch, tokens]; None where there is none."""
    mask = batch.get(f"decoder_{_MASK}" if _has_decoder(batch) else _MASK)
    return mask if isinstance(mask, torch.Tensor) else None


def _has_decoder(batch: Mapping[str, Any]) -> bool:
    return any(name.startswith("decoder_") for name in batch)


def seeded(run: Callable[[], Any]) -> Any:
    """Run with fixed random numbers, so that a model that draws some answers the same twice; the caller's stay."""
    # Seeding through `torch.manual_seed` would reach every device, forked or not.
    on_gpu = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count())) if on_gpu else []):
        torch.default_generator.manual_seed(_SEED)
        if on_gpu:
            torch.cuda.manual_seed_all(_SEED)
        return run()


def output_distance(
    changed: Mapping[str, Any], reference: Mapping[str, Any], batch: Mapping[str, Any] | None = None
) -> float:
    """One number for ranking candidates: mean KL divergence where an output looks like logits, else the relative
    squared error of the worst output.

    Args:
        changed, reference: outputs by name.
        batch: the inputs they answer, for their mask.
    """
    meter = DriftMeter()
    meter.add(changed, reference, batch)
    drift = meter.result()
    return drift.relative**2 if drift.kl is None else drift.kl


def measure_drift(
    run: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    reference: Program,
    batches: Sequence[Mapping[str, Any]],
    *,
    source: str = "calibration",
    progress: Callable[[Iterable[Any], int | None, str], Iterable[Any]] = lambda items, total, label: items,
) -> Drift:
    """Run both programs on every batch, one batch at a time.

    Args:
        run: answers named inputs of ``reference`` with the changed program's outputs.
        reference: the program to compare with.
        batches: named inputs.
        source: where the batches are from, for the report.
        progress: shows a bar.
    """
    meter = DriftMeter(source)
    for batch in progress(batches, len(batches), "drift"):
        changed, wanted = seeded(lambda batch=batch: run(batch)), seeded(lambda batch=batch: reference.run(batch))
        meter.add(changed, wanted, batch)
    return meter.result()
