"""The weights of a program under the names of a `transformers` checkpoint, and what becomes of the names.

Layers are what names differ in by a number: ``model.layers`` for ``model.layers.0.mlp.up_proj.weight``. Those that the
program reads nothing of are gone, and the others close ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .program import Program
from .weights import Weight

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """Layers under one name.

    Attributes:
        name: what comes before the number.
        size: how many there were.
        kept: the numbers of those that are left.
    """

    name: str
    size: int
    kept: tuple[int, ...]


def weights_by_name(program: Program, names: Mapping[str, Shape]) -> dict[str, Weight]:
    """The weights that the program reads, of those names; a tied one under all of its names."""
    used = program.used_weights()
    own: dict[str, Weight] = {}
    for name in names:
        kept = program.tied.get(name, name)
        if kept in used:
            own[name] = program.weights[kept]
        elif f"{name}_transposed" in used:  # how passes that raise operators call it
            own[name] = program.weights[f"{name}_transposed"].permute((1, 0))
    return own


def numbers(name: str) -> list[tuple[str, int]]:
    """The numbers in a name, each with what comes before it."""
    parts = name.split(".")
    return [(".".join(parts[:i]), int(part)) for i, part in enumerate(parts) if part.isdecimal()]


class Names:
    """Names before and after layers were dropped.

    Args:
        old: names and shapes of the original state dict.
        own: the weights that are left, by original name.

    Attributes:
        stacks: the layers.
        before: for each name of the new state dict, the original one.
    """

    def __init__(self, old: Mapping[str, Shape], own: Mapping[str, Weight]) -> None:
        self.old, self.own = old, own
        self.stacks = self._stacks()
        self._kept = {stack.name: stack.kept for stack in self.stacks}
        self.before = {self.renumbered(name): name for name in old if not self._dropped(name)}

    def _stacks(self) -> list[Stack]:
        everything: dict[str, set[int]] = {}
        left: dict[str, set[int]] = {}
        for name in self.old:
            for prefix, number in numbers(name):
                everything.setdefault(prefix, set()).add(number)
                if name in self.own:
                    left.setdefault(prefix, set()).add(number)
        return [
            Stack(prefix, len(found), tuple(sorted(left[prefix])))
            for prefix, found in everything.items()
            if found == set(range(len(found))) and left.get(prefix)
        ]

    def _dropped(self, name: str) -> bool:
        return any(number not in self._kept.get(prefix, (number,)) for prefix, number in numbers(name))

    def renumbered(self, name: str) -> str:
        """A name of what is left, under the number that its layer has now."""
        parts = name.split(".")
        for prefix, number in numbers(name):
            if prefix in self._kept:
                parts[len(prefix.split(".")) if prefix else 0] = str(self._kept[prefix].index(number))
        return ".".join(parts)

    def layers_with(self, name: str) -> tuple[str, int, str, list[int]] | None:
        """For a name that is missing in its layer: the stack, the layer, the rest, and the layers that have it."""
        for prefix, number in numbers(name):
            rest = name.removeprefix(f"{prefix}.{number}")
            alike = [i for i in self._kept.get(prefix, ()) if f"{prefix}.{i}{rest}" in self.own]
            if alike:
                return prefix, number, rest.removeprefix("."), alike
        return None

    def by_layer(self, stack: Stack) -> dict[str, dict[int, Shape]]:
        """The shapes of each weight in every layer that has it."""
        found: dict[str, dict[int, Shape]] = {}
        for name, weight in self.own.items():
            for prefix, number in numbers(name):
                rest = name.removeprefix(f"{prefix}.{number}").removeprefix(".")
                if prefix == stack.name and rest:
                    found.setdefault(rest, {})[number] = weight.shape
        return found


__all__ = ["Names", "Shape", "Stack", "numbers", "weights_by_name"]
