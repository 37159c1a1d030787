"""The operator against rotations of the complex plane."""

from __future__ import annotations

import pytest
import torch

import graphlathe
from graphlathe.kernels import rotary_embedding


def _angles(length: int, pairs: int) -> torch.Tensor:
    frequencies = 100.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return torch.arange(length, dtype=torch.float64)[:, None] * frequencies


def _turned(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Pairs of channels as complex numbers, times ``exp(i angle)``."""
    pairs = angles.shape[-1]
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :pairs], x[..., pairs:])
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    parts = (turned.real, turned.imag)
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("wide", [False, True], ids=["for each pair", "for each channel"])
@pytest.mark.parametrize("rest", [0, 6])
def test_it_turns_pairs_and_leaves_the_rest(interleaved: bool, wide: bool, rest: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8 + rest, dtype=torch.float64)
    angles = _angles(5, 4)
    given = angles
    if wide:
        given = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    actual = rotary_embedding(x, given.cos(), given.sin(), rotary_dim=8, interleaved=interleaved)
    torch.testing.assert_close(actual[..., :8], _turned(x[..., :8], angles, interleaved))
    assert torch.equal(actual[..., 8:], x[..., 8:])


def test_products_depend_on_the_distance_of_positions_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    angles = _angles(12, 4)
    q, k = (rotary_embedding(t.expand(12, 8), angles.cos(), angles.sin(), rotary_dim=8) for t in (q, k))
    products = q @ k.T
    for distance in range(1, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


class _Rotated(torch.nn.Module):
    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotary_embedding(x, cos, sin, rotary_dim=4, interleaved=True)


def test_it_is_one_node_of_a_trace_and_runs_in_onnx_runtime(tmp_path: object) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    angles = _angles(5, 2).float()
    given = (torch.randn(2, 5, 6), angles.cos(), angles.sin())
    program = graphlathe.trace(_Rotated(), given)
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [rotary_embedding]
    path = program.export_onnx(f"{tmp_path}/m.onnx")
    session = onnxruntime.InferenceSession(str(path))
    names = [i.name for i in session.get_inputs()]
    (actual,) = session.run(None, {n: t.numpy() for n, t in zip(names, given, strict=True)})
    torch.testing.assert_close(torch.from_numpy(actual), _Rotated()(*given))
