"""An operator's call as text with gaps for its operands: ``addmm(_, _, _, beta=1)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..describe import dtype_text

GAP = "\x01"


def call_template(node: fx.Node) -> tuple[str, list[fx.Node]]:
    """The arguments as text, with `GAP` for each operand, and the operands in that order."""
    operands: list[fx.Node] = []
    parts = [_text(argument, operands) for argument in node.args]
    parts += [f"{key}={_text(node.kwargs[key], operands)}" for key in sorted(node.kwargs)]
    return ", ".join(parts), operands


def _text(value: Any, operands: list[fx.Node]) -> str:
    match value:
        case fx.Node():
            operands.append(value)
            return GAP
        case tuple() | list():
            return f"[{', '.join(_text(item, operands) for item in value)}]"
        case dict():
            return f"{{{', '.join(f'{key}: {_text(item, operands)}' for key, item in value.items())}}}"
        case slice():
            return ":".join(_text(end, operands) for end in (value.start, value.stop, value.step))
        case str():
            return repr(value).replace(GAP, " ")
        case torch.dtype():
            return dtype_text(value)
        case _:
            return str(value)
