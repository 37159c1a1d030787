"""Bytes that a sparse matrix takes on disk, its positions included."""

from __future__ import annotations


def sparse_bytes(rows: int, columns: int, nonzeros: int, value_bytes: int) -> int:
    """The smallest of three ways to store a matrix; none of them hides the positions.

    Args:
        rows, columns: the shape.
        nonzeros: how many values are not zero.
        value_bytes: bytes of one value.

    Returns:
        Bytes of the cheapest of: all values, zeros too; the nonzero values and one bit per entry; the nonzero values,
        each with a column number of as many bits as it needs, and a count per row.
    """
    entries = rows * columns
    bitmap = nonzeros * value_bytes + (entries + 7) // 8
    index_bits = max(columns - 1, 1).bit_length()
    listed = nonzeros * value_bytes + (nonzeros * index_bits + rows * columns.bit_length() + 7) // 8
    return min(entries * value_bytes, bitmap, listed)
