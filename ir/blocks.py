"""Which units of a chain make one block (one layer of the configuration).

Each unit gets a letter: `a` mixes positions by attention or otherwise, `x` is attention to another stack, `c`
convolves, `p` is position-wise, `b` holds a mixing and a position-wise branch side by side (a parallel residual).

1. In a chain without `a`, `b` and `x`, every unit is a block; but in a chain of both `c` and `p`, a `c` starts a block
   and the `p` that follow belong to it.
2. Else a block starts with an `a` or `b`; what follows belongs to it: an `x` or `c` as long as no `p` has come (the
   cross-attention of a decoder, the convolution of a conformer), and every `p`. After a `p`, an `x` or `c` starts a
   block of its own (the convolutional layers of a hybrid).
3. Units before the first `a` are the first part of their block if the units between two `a` end alike (the
   macaron form ``p a c p``, or a ``c`` before every ``a``); else a lone `c` there is a stem (a convolution that encodes
   positions), which is no block.
4. In a hybrid (mixing units of several kinds, such as attention and state space) of which some but not all are followed
   by a `p`, the layers are single units (Nemotron-H). In a chain of one kind, a block without `p` is one that was cut.

The alternative, the shortest period of the isomorphism classes, is not used: it takes two layers of alternating kind
for one, and nothing recurs in a model of one layer or after a cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from .branches import Verdict
from .flow import Flow, op_name
from .residual import Unit

_MIXES = {"attention", "mixer", "other"}


@dataclass
class Labelled:
    """A unit with the verdicts on its branches and its letter (see the module's text)."""

    unit: Unit
    verdicts: tuple[Verdict, ...]
    letter: str


def letter_of(verdicts: Sequence[Verdict]) -> str:
    """The letter of a unit with these branches."""
    kinds = {v.kind for v in verdicts}
    if kinds & _MIXES:
        if "mlp" in kinds:
            return "b"
        return "x" if all(v.cross for v in verdicts if v.kind == "attention") and kinds == {"attention"} else "a"
    return "c" if "conv" in kinds else "p"


def group(units: Sequence[Labelled]) -> tuple[list[list[Labelled]], list[Labelled]]:
    """Group a chain's units into blocks.

    Returns:
        The blocks, and the units that are a stem before them.
    """
    letters = {u.letter for u in units}
    if not letters & set("abx"):
        starts = "c" if letters == {"c", "p"} else "cp"
        return _split(units, lambda block, u: u.letter in starts), []
    blocks = _split(units, _starts)
    stem: list[Labelled] = []
    lone = [_letters(block) == "c" for block in blocks]
    if len(blocks) > 3 and len(blocks) % 2 == 0 and lone == [i % 2 == 0 for i in range(len(blocks))]:
        blocks = [[*a, *b] for a, b in zip(blocks[::2], blocks[1::2], strict=True)]
    elif len(blocks) > 1 and lone[0]:
        stem, blocks = blocks[0], blocks[1:]
    elif len(blocks) > 1 and not _mixes(blocks[0]):
        lead = _letters(blocks[0])
        if all(_letters(block)[1:].endswith(lead) and len(block) > len(lead) + 1 for block in blocks[1:-1]):
            blocks = _shift(blocks)
    with_p = [("p" in _letters(block) or "b" in _letters(block)) for block in blocks if _mixes(block)]
    kinds = {v.kind for u in units if u.letter in "ab" for v in u.verdicts if v.kind in _MIXES}
    if len(kinds) > 1 and any(with_p) and not all(with_p):
        blocks = [[u] for block in blocks for u in block]
    return blocks, stem


def _letters(block: Sequence[Labelled]) -> str:
    return "".join(u.letter for u in block)


def _mixes(block: Sequence[Labelled]) -> bool:
    return any(u.letter in "abx" for u in block)


def _split(units: Sequence[Labelled], starts: Callable[[list[Labelled], Labelled], bool]) -> list[list[Labelled]]:
    blocks: list[list[Labelled]] = []
    for unit in units:
        if not blocks or starts(blocks[-1], unit):
            blocks.append([unit])
        else:
            blocks[-1].append(unit)
    return blocks


def _starts(block: Sequence[Labelled], unit: Labelled) -> bool:
    if unit.letter in "ab":
        return True
    return unit.letter in "xc" and any(u.letter in "pb" for u in block)


def _shift(blocks: list[list[Labelled]]) -> list[list[Labelled]]:
    """Give each block the units that lead to its mixing unit, taken from the end of the block before."""
    lead, rest = blocks[0], blocks[1:]
    count = len(lead)
    shifted: list[list[Labelled]] = []
    for block in rest[:-1]:
        shifted.append([*lead, *block[:-count]])
        lead = block[-count:]
    return [*shifted, [*lead, *rest[-1]]]


def settle_tails(flow: Flow, blocks: Sequence[Sequence[Labelled]]) -> None:
    """Decide what follows a block's last addition and still belongs to the block.

    A post-norm or an activation does: it follows every block, the last one included (whose tail is found here by the
    example of the others). What follows only some blocks (position embeddings added halfway) does not.
    """
    ends = [block[-1].unit for block in blocks]
    last, others = ends[-1], [unit for unit in ends[:-1] if unit.kind != "sequential"]
    if last.kind == "sequential":
        return
    examples = others or [u.unit for u in blocks[-1][:-1]]
    patterns = {tuple(op_name(n) for n in unit.tail) for unit in examples}
    tail = _follow(flow, last.end, next(iter(patterns))) if len(patterns) == 1 else None
    if tail is not None:
        last.tail = tail
    else:
        for unit in others:
            unit.tail = []


def _follow(flow: Flow, node: fx.Node, names: Sequence[str]) -> list[fx.Node] | None:
    """The values after ``node`` made by operators of these names, each dominated by the one before."""
    if not names:
        return []
    for user in flow.users(node):
        if op_name(user) == names[0] and flow.dominators.parent.get(user) is node:
            rest = _follow(flow, user, names[1:])
            if rest is not None:
                return [user, *rest]
    return None
