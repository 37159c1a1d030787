"""Statistics of the values that consumers read, over calibration data: moments of each column, and Gram matrices.

One run of the program on each batch serves all consumers. Consumers that read the same rows (queries, keys and values
of one attention) share one measurement. Columns are those of the consumer's matrix (`consumers.columns_labels`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors
import torch
import torch.utils._pytree as pytree
from safetensors.torch import save
from torch import Tensor

from ...ir.errors import ImportModelError, PreconditionError
from ...ir.files import write_atomically
from ...ir.program import Program
from ...ir.weights import Weight
from ..base import Batch, Context
from .consumers import Consumer, input_columns, rows_key
from .rows import RowReader

_BLOCK = 512
"""Rows of one float32 product; products are added up in float64."""

_SAVE_EVERY = 60.0
"""Seconds between two savings of a running collection."""

_FORMAT = "1"


class Moments:
    """Count, mean and spread of each column, in float64; parts of the data can be measured apart and merged.

    The merge is that of Chan, Golub and LeVeque (1979): no sum of squares from which a square is taken away, so that a
    constant column has variance 0.

    Attributes:
        count: rows seen.
        mean: [columns].
        deviation: [columns], the sum of ``(x - mean)^2``.
        absolute: [columns], the sum of ``|x|``.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean, self.deviation, self.absolute = torch.zeros(3, columns, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Count rows [n, columns]."""
        if not len(rows):
            return
        part = Moments(rows.shape[1], rows.device)
        rows = rows.double()
        part.count = len(rows)
        part.mean = rows.mean(0)
        # The mean of equal numbers need not be that number in floating point; the spread around it is then not zero.
        part.mean = torch.where((rows == rows[0]).all(0), rows[0], part.mean)
        part.deviation = (rows - part.mean).square().sum(0)
        part.absolute = rows.abs().sum(0)
        self.merge(part)

    def merge(self, other: Moments) -> None:
        """Count what another one has seen as well."""
        total = self.count + other.count
        if not total:
            return
        step = other.mean.to(self.mean.device) - self.mean
        share = other.count / total
        self.deviation = self.deviation + other.deviation.to(self.mean.device) + step.square() * (self.count * share)
        self.mean = self.mean + step * share
        self.absolute = self.absolute + other.absolute.to(self.mean.device)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """[columns], ``E[(x - E x)^2]``."""
        return self.deviation / max(self.count, 1)

    @property
    def squares(self) -> Tensor:
        """[columns], the sum of ``x^2``."""
        return self.deviation + self.count * self.mean.square()

    @property
    def absolute_mean(self) -> Tensor:
        """[columns], ``E |x|``."""
        return self.absolute / max(self.count, 1)


class Gram:
    """The second moments of all pairs of columns; parts of the data can be measured apart and merged.

    Attributes:
        count: rows seen.
        matrix: float64 [columns, columns], the sum of ``x x^T``.
        total: float64 [columns], the sum of ``x``.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.matrix = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.total = torch.zeros(columns, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Count rows [n, columns]; products of float32 (or less) are taken in float32, of float64 in float64."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        for block in rows.split(_BLOCK):
            self.matrix += block.T @ block
            self.total += block.sum(0, dtype=torch.float64)
        self.count += len(rows)

    def merge(self, other: Gram) -> None:
        """Count what another one has seen as well."""
        self.matrix = self.matrix + other.matrix.to(self.matrix.device)
        self.total = self.total + other.total.to(self.total.device)
        self.count += other.count

    @property
    def mean(self) -> Tensor:
        """[columns], ``E x``."""
        return self.total / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """[columns, columns], ``E[(x - E x) (x - E x)^T]``."""
        return self.matrix / max(self.count, 1) - torch.outer(self.mean, self.mean)


@dataclass(eq=False)
class Statistics:
    """What was measured of one consumer's rows.

    Attributes:
        moments: of each column.
        gram: of all pairs of columns, None where it was not asked for.
    """

    moments: Moments
    gram: Gram | None = None

    def add(self, rows: Tensor) -> None:
        """Count rows [n, columns]."""
        self.moments.add(rows)
        if self.gram is not None:
            self.gram.add(rows)

    def merge(self, other: Self) -> None:
        """Count what another one has seen as well."""
        self.moments.merge(other.moments)
        if self.gram is not None and other.gram is not None:
            self.gram.merge(other.gram)


class Collector:
    """Measures consumers, batch by batch.

    A Gram matrix of c columns takes ``8 c^2`` bytes; all of them are held at once, see `collect_in_chunks`.

    Args:
        program: the consumers' program; it must not change meanwhile.
        consumers: what to measure.
        gram: whether to measure Gram matrices, too.

    Attributes:
        batches: how many batches were added.
    """

    def __init__(self, program: Program, consumers: Sequence[Consumer], *, gram: bool = False) -> None:
        self.program = program
        self.batches = 0
        self._gram = gram
        self._reader = RowReader(program, consumers)
        self._found: dict[str, Statistics] = {}
        self._seen = hashlib.blake2b(digest_size=16)

    def add(self, batch: Batch) -> None:
        """Run the program on one batch, and measure.

        Raises:
            PreconditionError: a consumer reads NaN or infinity.
        """
        self._reader.read(batch, self._measure)
        self.batches += 1
        _hash(self._seen, batch)

    def _measure(self, key: str, rows: Tensor) -> None:
        statistics = self._found.get(key)
        if statistics is None:
            columns = rows.shape[1]
            gram = Gram(columns, rows.device) if self._gram else None
            statistics = self._found[key] = Statistics(Moments(columns, rows.device), gram)
        statistics.add(rows)

    def result(self) -> dict[Consumer, Statistics]:
        """What was measured; consumers of the same rows share one object."""
        return {consumer: self._found[key] for consumer, key in self._reader.keys.items() if key in self._found}

    def merge(self, other: Collector) -> None:
        """Count the batches of another collector of the same consumers as well.

        What `save` writes afterwards is no state to go on from: its batches are not the first of one sequence.
        """
        for key, statistics in other._found.items():
            if key in self._found:
                self._found[key].merge(statistics)
            else:
                self._found[key] = statistics
        self.batches += other.batches

    def save(self, path: Path) -> None:
        """Write what was measured so far to a safetensors file.

        Raises:
            ExportError: it cannot be written; an older file is left as it was.
        """
        tensors: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for key, statistics in self._found.items():
            moments, gram = statistics.moments, statistics.gram
            counts[key] = moments.count
            parts = {"mean": moments.mean, "deviation": moments.deviation, "absolute": moments.absolute}
            if gram is not None:
                parts |= {"matrix": gram.matrix, "total": gram.total}
            tensors |= {f"{key} {name}": part.cpu().contiguous().clone() for name, part in parts.items()}
        header = self._header() | {
            "batches": str(self.batches),
            "data": self._seen.hexdigest(),
            "counts": json.dumps(counts),
        }
        write_atomically(path, save(tensors, header))

    def load(self, path: Path, batches: Iterable[Batch]) -> None:
        """Go on from what `save` wrote.

        Args:
            path: the file.
            batches: the calibration batches; the first ones must be those that were measured.

        Raises:
            PreconditionError: the file is of another program, other consumers or other data.
            ImportModelError: it cannot be read.
        """
        try:
            with safetensors.safe_open(str(path), "pt") as file:
                header = dict(file.metadata() or {})
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except (OSError, safetensors.SafetensorError) as error:
            raise ImportModelError(
                f"cannot read the statistics in '{path}': {error}", remedy="delete the file to start again"
            ) from error
        for name, value in self._header().items():
            if header.get(name) != value:
                raise _foreign(path, name)
        done = int(header["batches"])
        seen = hashlib.blake2b(digest_size=16)
        for _, batch in zip(range(done), batches, strict=False):
            _hash(seen, batch)
        if seen.hexdigest() != header["data"]:
            raise _foreign(path, "calibration data")
        self._found = {}
        for key, count in json.loads(header["counts"]).items():
            moments = Moments(len(tensors[f"{key} mean"]))
            moments.count = count
            moments.mean, moments.deviation, moments.absolute = (
                tensors[f"{key} {name}"] for name in ("mean", "deviation", "absolute")
            )
            gram = None
            if self._gram:
                gram = Gram(0)
                gram.count, gram.matrix, gram.total = count, tensors[f"{key} matrix"], tensors[f"{key} total"]
            self._found[key] = Statistics(moments, gram)
        self.batches, self._seen = done, seen

    def _header(self) -> dict[str, str]:
        return {
            "format": _FORMAT,
            "program": self.program.fingerprint(),
            "consumers": json.dumps(list(self._reader.by_key)),
            "kind": "gram" if self._gram else "moments",
        }


def collect(
    program: Program,
    consumers: Sequence[Consumer],
    ctx: Context,
    *,
    gram: bool = False,
    saved: Path | None = None,
) -> dict[Consumer, Statistics]:
    """Measure consumers over the calibration data, in one pass.

    Args:
        program: the consumers' program.
        consumers: what to measure.
        ctx: calibration batches, progress.
        gram: whether to measure Gram matrices, too: ``8 c^2`` bytes for each distinct operand, all at once.
        saved: a file to which the state is written about once a minute and at the end, and from which a stopped
            collection goes on.

    Returns:
        The statistics of each consumer; consumers of the same rows share one object.

    Raises:
        PreconditionError: there is no calibration data, or it makes NaN or infinity, or hides every position; or
            ``saved`` belongs to another collection.
    """
    batches = calibration(ctx)
    collector = Collector(program, consumers, gram=gram)
    if saved is not None and saved.exists():
        collector.load(saved, batches)
    rest = batches[collector.batches :]
    last = time.monotonic()
    for batch in ctx.progress(rest, len(rest), "statistics"):
        collector.add(batch)
        if saved is not None and time.monotonic() - last > _SAVE_EVERY:
            collector.save(saved)
            last = time.monotonic()
    if saved is not None and rest:
        collector.save(saved)
    found = collector.result()
    for consumer in consumers:
        if consumer not in found or not found[consumer].moments.count:
            raise PreconditionError(
                "no position of the calibration data counts",
                node=consumer.node.name,
                origin=consumer.origin,
                remedy="check the attention_mask of the calibration data",
            )
    return found


def collect_in_chunks(
    program: Program, consumers: Sequence[Consumer], ctx: Context, *, limit_bytes: int, gram: bool = True
) -> Iterator[dict[Consumer, Statistics]]:
    """As `collect`, in as many passes over the data as the memory asks for.

    Args:
        program, consumers, ctx, gram: as for `collect`.
        limit_bytes: how much the statistics of one pass may take. An operand whose statistics alone take more has a
            pass of its own, so the peak is the larger of this and the largest operand's.

    Yields:
        The statistics of some of the consumers, in their order. What the caller does not keep is freed.
    """
    chunk: list[Consumer] = []
    sizes: dict[str, int] = {}
    for consumer in consumers:
        key = rows_key(consumer)
        columns = input_columns(consumer)
        size = 8 * columns * (3 + (columns + 1 if gram else 0))
        if chunk and key not in sizes and sum(sizes.values()) + size > limit_bytes:
            yield collect(program, chunk, ctx, gram=gram)
            chunk, sizes = [], {}
        chunk.append(consumer)
        sizes[key] = size
    if chunk:
        yield collect(program, chunk, ctx, gram=gram)


def calibration(ctx: Context) -> Sequence[Batch]:
    """The calibration batches.

    Raises:
        PreconditionError: there are none.
    """
    if not ctx.calibration:
        raise PreconditionError(
            "there is no calibration data", expected="batches of inputs", remedy="give calibration=..."
        )
    return ctx.calibration


def _hash(state: Any, batch: Batch) -> None:
    for name in sorted(batch):
        for leaf in pytree.tree_leaves(batch[name]):
            text = f"{name} {leaf!r}"
            if isinstance(leaf, Tensor):
                text = f"{name} {Weight.from_tensor(leaf).digest()}"
            state.update(text.encode())


def _foreign(path: Path, what: str) -> PreconditionError:
    return PreconditionError(
        f"the statistics in '{path}' are of another {what}",
        remedy="delete the file to start again, or name another one",
    )
