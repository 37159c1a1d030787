"""The text of a changed program, as goldens keep it."""

from __future__ import annotations

import re

from graphlathe.ir.program import Program

_DIGEST = re.compile(r"#[0-9a-f]{8}\b")


def golden_text(before: Program, after: Program) -> str:
    """The text of ``after``, in which digests of weights that ``before`` does not have read ``#new``.

    The last bits of what is fitted or trained depend on the machine and on how many threads it uses.
    """
    known = set(_DIGEST.findall(before.to_text()))
    return _DIGEST.sub(lambda found: found[0] if found[0] in known else "#new", after.to_text())
