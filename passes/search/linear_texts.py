"""What can be done to the weight of a linear layer, as short texts that plans hold.

    nonzeros=4096 method=sparsegpt      so many weights stay, the others are zero
    bits=4 group=64 method=gptq         codes of so many bits, a scale and a zero point for each group of columns
    rank=64 nonzeros=32                 two factors; each output keeps so many of the coefficients (all without it)

The first two may end in ``correction=16``: the rank of two maps beside the weight, which make up for what it lost. In
a plan ``shape=96x32`` (outputs by inputs) says which layer it was made for, and of codes ``was=32`` how many bits each
weight took before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...ir.errors import InputError
from .local.round_to_nearest import BITS

SPARSE_METHODS = ("sparsegpt", "ria-corrected", "ria", "wanda", "magnitude")
BITS_METHODS = ("gptq", "round-to-nearest")


@dataclass(frozen=True)
class Sparse:
    """So many weights stay.

    Attributes:
        nonzeros: how many, of the whole layer.
        method: how they are chosen, one of `SPARSE_METHODS`; ``sparsegpt`` and ``ria-corrected`` also correct them.
        correction: rank of the maps beside them; 0 for none.
    """

    nonzeros: int
    method: str = "sparsegpt"
    correction: int = 0

    def __str__(self) -> str:
        return f"nonzeros={self.nonzeros} method={self.method}{_correction_text(self.correction)}"


@dataclass(frozen=True)
class Bits:
    """Integer codes.

    Attributes:
        bits: of a code, 2 to 8.
        group: columns that share a scale and a zero point; None for whole rows.
        method: how codes are chosen, one of `BITS_METHODS`.
        correction: rank of the maps beside them; 0 for none.
    """

    bits: int
    group: int | None = None
    method: str = "gptq"
    correction: int = 0

    def __str__(self) -> str:
        group = "" if self.group is None else f" group={self.group}"
        return f"bits={self.bits}{group} method={self.method}{_correction_text(self.correction)}"


@dataclass(frozen=True)
class LowRank:
    """Two factors.

    Attributes:
        rank: the width between them.
        nonzeros: coefficients that each output keeps on average; None for all.
    """

    rank: int
    nonzeros: int | None = None

    def __str__(self) -> str:
        return f"rank={self.rank}" + ("" if self.nonzeros is None else f" nonzeros={self.nonzeros}")


LinearLevel = Sparse | Bits | LowRank


def needs_data(level: LinearLevel) -> bool:
    """Whether a level can only be computed from calibration data."""
    return isinstance(level, LowRank) or level.correction > 0 or level.method not in ("magnitude", "round-to-nearest")


def correction_of(level: LinearLevel) -> int:
    """The rank of the maps beside a layer's weight; 0 for none."""
    return 0 if isinstance(level, LowRank) else level.correction


def for_plan(level: LinearLevel, outputs: int, inputs: int, was: int) -> str:
    """The text of a level of a layer [outputs, inputs] whose weights took ``was`` bits each, as plans hold it."""
    return f"{level} shape={outputs}x{inputs}" + (f" was={was}" if isinstance(level, Bits) else "")


def kept_share(text: str) -> float | None:
    """The share of a layer that a level leaves: of its numbers, or of their bits without scales and zero points.

    Maps beside the weight are counted.

    Args:
        text: of a plan.

    Returns:
        A share, above 1 where it becomes more; None where the text does not say of how much.

    Raises:
        InputError: it is no such text.
    """
    given = dict(token.split("=") for token in text.split() if token.count("=") == 1)
    sizes = [int(size) for size in given.get("shape", "").split("x") if size.isdecimal()]
    if len(sizes) != 2 or 0 in sizes:
        return None
    outputs, inputs = sizes
    level = parse(text, outputs, inputs)
    beside = correction_of(level) * (outputs + inputs) / (outputs * inputs)
    if isinstance(level, Sparse):
        return level.nonzeros / (outputs * inputs) + beside
    if isinstance(level, Bits):
        return level.bits / int(given["was"]) + beside if "was" in given else None
    each = level.rank if level.nonzeros is None else level.nonzeros
    return (level.rank * inputs + each * outputs) / (outputs * inputs)


def parse(text: str, outputs: int, inputs: int) -> LinearLevel:
    """A level from its text.

    Args:
        text: as in this module's text, with or without ``shape`` and ``was``.
        outputs, inputs: widths of the layer.

    Raises:
        InputError: it is no such text, or does not fit the layer.
    """
    given: dict[str, str] = {}
    for token in text.split():
        key, equals, value = token.partition("=")
        if not equals or key in given:
            raise _wrong(text, f"'{token}' is not a new key=value")
        given[key] = value
    shape = given.pop("shape", None)
    if shape is not None and shape != f"{outputs}x{inputs}":
        raise _wrong(text, f"the layer has {outputs} outputs and {inputs} inputs")
    read = _FORMS.get(frozenset(given) - {"group", "method", "correction", "was"})
    if read is None:
        raise _wrong(text, "it is none of the known forms")
    level = read(text, given)
    if given:
        raise _wrong(text, f"'{next(iter(given))}' has no meaning here")
    _check(text, level, outputs, inputs)
    return level


def _sparse(text: str, given: dict[str, str]) -> LinearLevel:
    return Sparse(_number(text, given, "nonzeros"), _method(text, given, SPARSE_METHODS), _correction(text, given))


def _bits(text: str, given: dict[str, str]) -> LinearLevel:
    group = _number(text, given, "group") if "group" in given else None
    if "was" in given and _number(text, given, "was") < 1:
        raise _wrong(text, "no weight takes 0 bits")
    return Bits(_number(text, given, "bits"), group, _method(text, given, BITS_METHODS), _correction(text, given))


def _low_rank(text: str, given: dict[str, str]) -> LinearLevel:
    nonzeros = _number(text, given, "nonzeros") if "nonzeros" in given else None
    return LowRank(_number(text, given, "rank"), nonzeros)


_FORMS: dict[frozenset[str], Callable[[str, dict[str, str]], LinearLevel]] = {
    frozenset({"nonzeros"}): _sparse,
    frozenset({"bits"}): _bits,
    frozenset({"rank"}): _low_rank,
    frozenset({"rank", "nonzeros"}): _low_rank,
}


def _check(text: str, level: LinearLevel, outputs: int, inputs: int) -> None:
    most = min(outputs, inputs)
    ranges: dict[str, tuple[int | None, int, int]] = {"correction": (correction_of(level), 0, most)}
    if isinstance(level, Sparse):
        ranges["nonzeros"] = level.nonzeros, 0, outputs * inputs
    elif isinstance(level, Bits):
        ranges["bits"] = level.bits, BITS[0], BITS[-1]
        ranges["group"] = level.group, 1, level.group or 1
    else:
        ranges["rank"] = level.rank, 1, most
        ranges["nonzeros"] = level.nonzeros, 1, min(level.rank, most)
    for name, (value, least, largest) in ranges.items():
        if value is not None and not least <= value <= largest:
            raise _wrong(
                text, f"{name} is {value}, of a layer of {outputs} outputs and {inputs} inputs", (least, largest)
            )


def _number(text: str, given: dict[str, str], key: str) -> int:
    value = given.pop(key)
    if not value.isdecimal():
        raise _wrong(text, f"{key} is '{value}'")
    return int(value)


def _correction(text: str, given: dict[str, str]) -> int:
    return _number(text, given, "correction") if "correction" in given else 0


def _correction_text(rank: int) -> str:
    return f" correction={rank}" if rank else ""


def _method(text: str, given: dict[str, str], choices: tuple[str, ...]) -> str:
    method = given.pop("method", choices[0])
    if method not in choices:
        raise _wrong(text, f"method is '{method}'", choices)
    return method


def _wrong(text: str, why: str, allowed: tuple[Any, ...] = ()) -> InputError:
    expected = "for example 'bits=4 group=64 method=gptq'"
    if allowed:
        numbers = isinstance(allowed[0], int)
        expected = f"{allowed[0]} to {allowed[1]}" if numbers else f"one of: {', '.join(allowed)}"
    return InputError(f"cannot store a layer as '{text}': {why}", expected=expected)
