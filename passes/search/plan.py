"""Plans: what is removed and what stays, and why, as data that can be saved, inspected, edited and applied again.

A plan names places by kind and number, never by a name of the model, so that it fits the same model from PyTorch, from
ONNX and from a saved program. It says how many units each place has and what reads them; a plan for another model is
refused. Applying is deterministic: the same plan, program and calibration data give the same weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ...ir.errors import InputError, suggest
from ...ir.files import write_atomically

FORMAT = "graphlathe-plan"
VERSION = 1
LINEAR = "linear"
"""The kind of the weights of linear layers, which have levels instead of units."""
PARTIAL = "not in the plan"
"""The compensation of a plan that is only a part of what its pass did: for reading and pictures, not to be applied."""


@dataclass(frozen=True)
class Decision:
    """What happens at one place.

    Attributes:
        kind: a kind of channels (`sites.KINDS`), ``drop-block``, ``drop-attention`` or ``drop-mlp`` for units of a
            stream, or ``linear`` for the weight of a linear layer.
        index: its number among those of its kind, in graph order.
        label: for reports.
        block: the number of its block over all streams, or None.
        units: how many units it has (channels, heads; 1 for what can only be dropped).
        removed: the units that go.
        level: how a weight is stored, for ``linear``: ``nonzeros=1024``, ``bits=4``, ``rank=64``.
        reason: why these.
        scores: the score of every unit, where there are some.
    """

    kind: str
    index: int
    label: str
    block: int | None
    units: int
    removed: tuple[int, ...] = ()
    level: str = ""
    reason: str = ""
    scores: tuple[float, ...] | None = None

    @property
    def kept(self) -> tuple[int, ...]:
        """The units that stay."""
        gone = set(self.removed)
        return tuple(unit for unit in range(self.units) if unit not in gone)

    @property
    def changes(self) -> bool:
        """Whether anything happens here."""
        return bool(self.removed) or bool(self.level)


@dataclass(frozen=True)
class Plan:
    """A set of decisions.

    Attributes:
        decisions: one for every place that was looked at.
        made_by: the text of the pass.
        compensation: how the rest makes up for what is removed; needed to apply the plan again. `PARTIAL`: it cannot.
        rank: of the maps that take the places of dropped units; 0 for none.
        program: fingerprint of the program that it was made for.
        budget: unit, limit, before, after; of milliseconds, where ``after`` is added up, also ``measured``, what the
            result takes, and ``runs``, how often programs were run to measure.
        search: the history of the search, for pictures; None where there was none.
        blocked: why other places could not be touched, with counts.
    """

    decisions: tuple[Decision, ...]
    made_by: str = ""
    compensation: str = "none"
    rank: int = 0
    program: str = ""
    budget: Mapping[str, Any] = field(default_factory=dict[str, Any])
    search: Mapping[str, Any] | None = None
    blocked: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def changes(self) -> list[Decision]:
        """The decisions that change something."""
        return [decision for decision in self.decisions if decision.changes]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "made_by": self.made_by,
            "compensation": self.compensation,
            "rank": self.rank,
            "program": self.program,
            "budget": dict(self.budget),
            "sites": [_plain(decision) for decision in self.decisions],
            "blocked": dict(self.blocked),
            "search": self.search,
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "the plan") -> Plan:
        """A plan from JSON data; ``kept`` is there to be read and is not looked at.

        Args:
            data: what `to_json` gave, perhaps edited.
            where: what to call it in errors.

        Raises:
            InputError: it is no plan, or a decision makes no sense.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(f"{where} is no plan", expected=f"an object whose format is {FORMAT!r}")
        if data.get("version") != VERSION:
            raise InputError(f"{where} has version {data.get('version')!r}", expected=f"version {VERSION}")
        sites = data.get("sites")
        if not isinstance(sites, list):
            raise InputError(f"{where} has no list of sites")
        for name in ("budget", "search", "blocked"):
            if not isinstance(data.get(name), dict | None):
                raise InputError(f"{where}: '{name}' is {data[name]!r}", expected="an object")
        rank = data.get("rank", 0)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise InputError(f"{where}: 'rank' is {rank!r}", expected="a number from 0 on")
        decisions = tuple(_decision(site, f"site {number} of {where}") for number, site in enumerate(sites))
        seen: dict[tuple[str, int], int] = {}
        for number, decision in enumerate(decisions):
            first = seen.setdefault((decision.kind, decision.index), number)
            if first != number:
                raise InputError(
                    f"site {number} of {where} is {decision.kind} {decision.index}, as is site {first}",
                    expected="each place once",
                )
        return cls(
            decisions=decisions,
            made_by=str(data.get("made_by", "")),
            compensation=str(data.get("compensation", "none")),
            rank=rank,
            program=str(data.get("program", "")),
            budget=data.get("budget") or {},
            search=data.get("search"),
            blocked=data.get("blocked") or {},
        )

    def save(self, path: Path) -> None:
        """Write the plan as JSON; the file appears complete or not at all.

        Raises:
            ExportError: it cannot be written.
        """
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            InputError: the file cannot be read, or holds no plan.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"cannot read the plan '{path}': {error}", expected="a JSON file") from error
        return cls.from_json(data, f"'{path}'")

    def with_budget(self, **figures: Any) -> Plan:
        """The plan with more figures in its budget."""
        return replace(self, budget={**self.budget, **figures})


def _plain(decision: Decision) -> dict[str, Any]:
    scores = None if decision.scores is None else list(decision.scores)
    return {**asdict(decision), "removed": list(decision.removed), "kept": list(decision.kept), "scores": scores}


_SITE_KEYS = (*(each.name for each in fields(Decision)), "kept")
_FIELDS = {"kind": str, "index": int, "units": int, "removed": list}


def _decision(data: Any, where: str) -> Decision:
    if not isinstance(data, dict):
        raise InputError(f"{where} is a {type(data).__name__}", expected="an object")
    for key in data:
        if key not in _SITE_KEYS:
            raise InputError(
                f"{where} has the unknown key '{key}'{suggest(str(key), _SITE_KEYS)}",
                expected=f"one of: {', '.join(_SITE_KEYS)}",
            )
    for name, kind in _FIELDS.items():
        value = data.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{where}: '{name}' is {value!r}", expected=f"a {kind.__name__}")
    units, index = data["units"], data["index"]
    if index < 0 or units < 1:
        wrong = f"'index' is {index}" if index < 0 else f"'units' is {units}"
        raise InputError(f"{where}: {wrong}", expected="an index from 0 on, and at least one unit")
    removed: Sequence[Any] = data["removed"]
    wrong = [u for u in removed if not isinstance(u, int) or isinstance(u, bool) or not 0 <= u < units]
    if wrong or len(set(removed)) < len(removed):
        what = f"{wrong[0]!r} is no unit" if wrong else "a unit is named twice"
        raise InputError(f"{where}: cannot remove {list(removed)[:8]}: {what}", expected=f"units 0 to {units - 1}")
    block, scores = data.get("block"), data.get("scores")
    if block is not None and (not isinstance(block, int) or isinstance(block, bool)):
        raise InputError(f"{where}: 'block' is {block!r}", expected="a number, or null")
    if scores is not None and not (isinstance(scores, list) and all(map(_is_number, scores))):
        raise InputError(f"{where}: 'scores' is {scores!r}"[:200], expected="a list of numbers, or null")
    if (data["kind"] == LINEAR and removed) or (data["kind"] != LINEAR and data.get("level")):
        raise InputError(
            f"{where}: a place of the kind '{data['kind']}' has no {'units' if data['kind'] == LINEAR else 'levels'}",
            expected=f"a level for the kind '{LINEAR}', units to remove for all others",
        )
    return Decision(
        kind=data["kind"],
        index=data["index"],
        label=str(data.get("label", "")),
        block=block,
        units=units,
        removed=tuple(sorted(removed)),
        level=str(data.get("level", "")),
        reason=str(data.get("reason", "")),
        scores=None if scores is None else tuple(map(float, scores)),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
