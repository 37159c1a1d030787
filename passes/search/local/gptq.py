"""Integer weights of one layer by GPTQ: round a column, let the later ones make up for it.

Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers* (2022), algorithm 1,
on the grid of `round_to_nearest`. The grid of a group is fitted when its first column is reached, to the weights
as corrected by then. With ``act_order`` the columns with the largest inputs go first, while they can still be made
up for; groups stay neighboring columns, so that nothing has to be reordered when the weight is used, and their
grids are fitted to the weight as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....ir.errors import InputError
from .column_sweep import sweep
from .damping import checked_layer, inverse_upper
from .round_to_nearest import Quantized, fit_grid, from_codes, to_codes


def gptq(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    *,
    act_order: bool = False,
    damping: float = 0.01,
    block: int = 128,
) -> Quantized:
    """Quantize one layer.

    Args:
        weight: [out, in].
        gram: [in, in], ``XᵀX``, summed or averaged over calibration rows.
        bits: bits of a code, 2 to 8.
        group_size: columns of a group; None for whole rows.
        symmetric: whether 0 is in the middle of the codes.
        act_order: round columns in the order of decreasing inputs.
        damping: share of the mean diagonal added to the gram matrix.
        block: columns whose corrections are collected before the rest of the weight gets them; changes the time,
            not the result.

    Raises:
        InputError: shapes that do not belong together; bits, group size or block out of range.
        PreconditionError: weight or gram matrix is not finite.
    """
    if block < 1:
        raise InputError(f"a block of {block} columns", expected="1 or more")
    values, matrix = checked_layer(weight, gram)
    scale, zero = fit_grid(weight, bits, group_size, symmetric)
    rows, width = values.shape
    size = width if group_size is None else group_size
    order = torch.arange(width, device=matrix.device)
    if act_order:
        order = matrix.diagonal().argsort(descending=True, stable=True)
    columns = values.T[order].contiguous()
    upper = inverse_upper(matrix[order][:, order], damping)
    codes = torch.empty(width, rows, dtype=torch.int8, device=columns.device)
    group_of = (order // size).tolist()
    # Groups as rows of contiguous memory, in the working type: they are read once per column.
    scales = scale.T.to(columns.dtype).contiguous()
    zeros = None if zero is None else zero.T.to(columns.dtype).contiguous()

    def fit(start: int, stop: int) -> None:
        if act_order or start % size:
            return
        step, offset = fit_grid(columns[start : start + size].T, bits, None, symmetric, weight.dtype)
        scale[:, start // size], scales[start // size] = step[:, 0], step[:, 0].to(scales.dtype)
        if zero is not None and zeros is not None and offset is not None:
            zero[:, start // size], zeros[start // size] = offset[:, 0], offset[:, 0].to(zeros.dtype)

    def project(index: int, column: Tensor) -> Tensor:
        group = group_of[index]
        step, offset = scales[group], None if zeros is None else zeros[group]
        rounded = to_codes(column, step, offset, bits)
        codes[order[index]] = rounded.to(torch.int8)
        return from_codes(rounded, step, offset)

    starts = sorted({*range(0, width, block), *(() if act_order else range(0, width, size))})
    sweep(columns, upper, starts, fit, project)
    return Quantized(codes.T.contiguous(), scale, zero, bits, size)
