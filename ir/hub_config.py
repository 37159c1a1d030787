"""Which configuration builds a `transformers` architecture with given shapes?

No field is known by name. Fields are tried: one that held the old size, or a divisor of it, gets what the new size asks
for, the architecture is built without numbers, and the shapes of its state dict are compared. A change that brings no
shape nearer is never tried again; changes that do are combined, best first.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .hub_model import fake_parameters, without_cache
from .hub_names import Shape, Stack

Shapes = Mapping[str, Shape]
Path = tuple[str | int, ...]
Change = dict[Path, Any]

_MOST_BUILDS = 400


@dataclass(frozen=True)
class Solution:
    """A configuration whose shapes fit, and what was changed in it."""

    config: Any
    changes: dict[str, Any]


def shapes_of(config: Any, architecture: type[Any]) -> dict[str, Shape]:
    """The names and shapes of an architecture's state dict.

    Raises:
        Exception: whatever the architecture raises for a configuration that makes no sense to it.
    """
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights():
            model = architecture._from_config(copy.deepcopy(config))
    except Exception:  # some compute numbers when they are built
        model = empty_model(config, architecture, torch.float32)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def empty_model(config: Any, architecture: type[Any], dtype: torch.dtype) -> Any:
    """A model of fake parameters and real buffers, without a cache; the configuration is not changed."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(config)
    without_cache(config)
    with no_init_weights(), fake_parameters(FakeTensorMode(allow_non_fake_inputs=True)):
        model = architecture._from_config(config, dtype=dtype)
    return model.eval()


def slots(values: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The fields that may hold a size: numbers, what is not set, and the entries of lists and of nested tables."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from slots(value, (*path, key))
    elif isinstance(values, (list, tuple)):
        for place, value in enumerate(values):
            yield from slots(value, (*path, place))
    elif values is None or (isinstance(values, (int, float)) and not isinstance(values, bool)):
        yield path, values


def lists(values: Any, size: int, path: Path = ()) -> Iterator[tuple[Path, list[Any]]]:
    """The lists of a length: what is said for each layer."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from lists(value, size, (*path, key))
    elif isinstance(values, (list, tuple)) and len(values) == size:
        yield path, list(values)


@dataclass
class Search:
    """The search for a configuration.

    Args:
        config: the original configuration.
        architecture: the model class.
        old: names and shapes of its state dict.
        target: the shapes that are wanted; names that may have any shape are mapped to None.
        stacks: the layers, by what comes before their numbers.
        before: the original name of each wanted name.
    """

    config: Any
    architecture: type[Any]
    old: Shapes
    target: Mapping[str, Shape | None]
    stacks: Sequence[Stack]
    before: Mapping[str, str]
    closest: tuple[int, dict[str, Any], set[str]] | None = None
    _known: dict[str, tuple[Any, dict[str, Shape]] | None] = field(default_factory=dict)

    def solutions(self) -> Iterator[Solution]:
        """Configurations whose shapes are those wanted, those with few changes first."""
        useful = self._candidates()
        order = itertools.count()
        first = self._off({})
        assert first is not None
        queue: list[tuple[int, int, int, Change]] = [(len(first), 0, next(order), {})]
        seen: set[str] = set()
        root = True
        while queue and len(self._known) < _MOST_BUILDS:
            off, _, _, change = heapq.heappop(queue)
            if off == 0:
                built = self._built(change)
                assert built is not None
                yield Solution(built[0], _named(change))
                continue
            helped: list[Change] = []
            for more in useful:
                if change.keys() & more.keys():
                    continue
                joined = change | more
                if (key := _key(joined)) in seen:
                    continue
                seen.add(key)
                wrong = self._off(joined)
                if wrong is None:
                    helped.append(more)  # it may need a second change to make sense
                    heapq.heappush(queue, (off, len(joined), next(order), joined))
                elif len(wrong) < off:
                    helped.append(more)
                    heapq.heappush(queue, (len(wrong), len(joined), next(order), joined))
                    if self.closest is None or len(wrong) < self.closest[0]:
                        self.closest = len(wrong), _named(joined), wrong
            if root:
                useful, root = helped, False

    def fields_of(self, name: str, dim: int) -> list[str]:
        """The fields that a dimension of a weight of the original depends on: those that change it when doubled."""
        found: list[str] = []
        for path, value in slots(self.config.to_dict()):
            if isinstance(value, int) and value > 0:
                built = self._built({path: 2 * value})
                if built is not None and name in built[1] and built[1][name][dim] != self.old[name][dim]:
                    found.append(_name(path))
        return found

    def with_epsilon(self, norms: Collection[float]) -> Iterator[Solution]:
        """The solutions, each first with the epsilon that the program's norms have by now.

        Cutting the channels of a norm exactly multiplies its epsilon by the ratio of the sizes, see `ir.axes.rescale`.

        Args:
            norms: the epsilons of all norms.
        """
        ratios = {before / after for before, after in self._sizes()}
        for solution in self.solutions():
            for epsilon in norms if len(norms) == 1 else ():
                change: Change = {
                    path: epsilon
                    for path, value in slots(self.config.to_dict())
                    if isinstance(value, float) and any(math.isclose(value * r, epsilon, rel_tol=1e-6) for r in ratios)
                }
                if change:
                    yield Solution(changed(solution.config, change), solution.changes | _named(change))
            yield solution

    def _candidates(self) -> list[Change]:
        values = self.config.to_dict()
        found: dict[str, Change] = {}

        def add(change: Change) -> None:
            found.setdefault(_key(change), change)

        for stack in (s for s in self.stacks if len(s.kept) < s.size):
            chosen: Change = {path: [given[i] for i in stack.kept] for path, given in lists(values, stack.size)}
            for path, value in slots(values):
                if value == stack.size and isinstance(value, int):
                    for with_lists in [chosen, {}] if chosen else [{}]:
                        add({p: v for p, v in with_lists.items() if path[: len(p)] != p} | {path: len(stack.kept)})
            if chosen:
                add(chosen)
        for before, after in self._sizes():
            for path, value in slots(values):
                if value is None:
                    add({path: after})
                elif isinstance(value, float):
                    if value > 0:
                        add({path: value * after / before})
                elif value > 0 and value * after % before == 0:
                    add({path: value * after // before})
        for stack in self.stacks:
            for path, given in lists(values, stack.size):
                for each in self._each_layer(stack, given):
                    add({path: each})
        return list(found.values())

    def _sizes(self) -> dict[tuple[int, int], None]:
        """The sizes that change: from what, to what."""
        found: dict[tuple[int, int], None] = {}
        for name, shape in self.target.items():
            old = self.old[self.before[name]]
            found |= {(a, b): None for a, b in zip(old, shape or old, strict=True) if a != b}
        return found

    def _each_layer(self, stack: Stack, given: list[Any]) -> Iterator[list[Any]]:
        """Lists that say a size for each layer, with every entry changed as its own layer is."""
        if len(stack.kept) < stack.size or not all(type(value) is int and value > 0 for value in given):
            return
        layers: dict[tuple[str, int], dict[int, tuple[int, int]]] = {}
        for name, shape in self.target.items():
            number, _, rest = name.removeprefix(f"{stack.name}.").partition(".")
            if name.startswith(f"{stack.name}.") and number.isdecimal() and shape is not None:
                for dim, (before, after) in enumerate(zip(self.old[self.before[name]], shape, strict=True)):
                    layers.setdefault((rest, dim), {})[int(number)] = before, after
        for pairs in layers.values():
            if len(pairs) == stack.size and any(a != b for a, b in pairs.values()):
                new = [given[i] * pairs[i][1] / pairs[i][0] for i in range(stack.size)]
                if all(value == int(value) for value in new):
                    yield [int(value) for value in new]

    def _off(self, change: Change) -> set[str] | None:
        """The names whose shapes are not those wanted; None where the architecture refuses the configuration."""
        built = self._built(change)
        if built is None:
            return None
        shapes = built[1]
        wrong = shapes.keys() ^ self.target.keys()
        return wrong | {n for n, shape in self.target.items() if n in shapes and shape not in (None, shapes[n])}

    def _built(self, change: Change) -> tuple[Any, dict[str, Shape]] | None:
        key = _key(change)
        if key not in self._known:
            try:
                config = changed(self.config, change)
                self._known[key] = config, shapes_of(config, self.architecture)
            except Exception:  # a configuration that makes no sense is none that we look for
                self._known[key] = None
        return self._known[key]


def changed(config: Any, change: Change) -> Any:
    """A configuration of the same kind with some fields changed."""
    values = copy.deepcopy(config.to_dict())
    for path, value in change.items():
        place = values
        for part in path[:-1]:
            if isinstance(place[part], tuple):
                place[part] = list(place[part])
            place = place[part]
        place[path[-1]] = value
    return type(config).from_dict(values)


def _name(path: Path) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def _named(change: Change) -> dict[str, Any]:
    return {_name(path): value for path, value in change.items()}


def _key(change: Change) -> str:
    return repr(sorted((repr(path), value) for path, value in change.items()))


__all__ = ["Search", "Solution", "empty_model", "shapes_of"]
