"""Lazy weights: expressions over a source equal the same steps done at once, read late, and never write."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import GraphlatheError, ImportModelError
from graphlathe.ir.weights import FileSource, MetaSource, RandomSource, TensorSource, Weight, file_version


def _file(path: Path, tensor: torch.Tensor, offset: int = 0) -> Weight:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    path.write_bytes(b"\xff" * offset + data + b"\xff" * 5)
    return Weight.from_file(path, offset, tensor.shape, tensor.dtype)


@st.composite
def _steps(draw: st.DrawFn) -> tuple[Weight, torch.Tensor]:
    """A weight of random steps, and the same steps on the tensor."""
    value = torch.arange(24.0).reshape(4, 6)
    weight = Weight.from_tensor(value)
    for _ in range(draw(st.integers(0, 6))):
        dim = draw(st.integers(0, value.dim() - 1))
        size = value.shape[dim]
        match draw(st.sampled_from(["slice", "select", "permute", "reshape", "cast", "scale"])):
            case "slice":
                start, stop = draw(st.integers(0, size)), draw(st.integers(0, size))
                step = draw(st.integers(1, 3))
                weight = weight.slice(dim, start, stop, step)
                value = value.narrow(dim, start, max(0, stop - start))
                value = value.index_select(dim, torch.arange(0, value.shape[dim], step))
            case "select":
                index = draw(st.lists(st.integers(0, size - 1), max_size=4)) if size else []
                weight, value = (
                    weight.select(dim, index),
                    value.index_select(dim, torch.tensor(index, dtype=torch.int64)),
                )
            case "permute":
                order = draw(st.permutations(range(value.dim())))
                weight, value = weight.permute(order), value.permute(*order)
            case "reshape":
                shape = draw(st.sampled_from([(value.numel(),), (1, value.numel()), (*value.shape, 1)]))
                weight, value = weight.reshape(shape), value.reshape(shape)
            case "cast":
                dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16]))
                weight, value = weight.cast(dtype), value.to(dtype)
            case _:
                weight, value = weight.scale(0.5), value * 0.5
    return weight, value


@given(_steps())
def test_steps_are_what_they_say(case: tuple[Weight, torch.Tensor]) -> None:
    """Shape and dtype are known before reading; numbers, bytes and size agree with the steps done at once."""
    weight, value = case
    assert weight.shape == tuple(value.shape) and weight.dtype == value.dtype
    assert weight.numel == value.numel() and weight.nbytes == value.numel() * value.element_size()
    assert torch.equal(weight.tensor(), value)
    assert b"".join(bytes(c) for c in weight.chunks(limit=7)) == value.numpy().tobytes()
    assert weight.digest() == Weight.from_tensor(value.clone()).digest()


def test_shape_and_dtype_are_known_without_reading() -> None:
    weight = Weight(MetaSource((4, 6), torch.float32)).slice(0, 1, 3).permute((1, 0)).cast(torch.float16)
    assert (weight.shape, weight.dtype, weight.nbytes, weight.is_meta) == ((6, 2), torch.float16, 24, True)
    with pytest.raises(GraphlatheError, match="has no numbers"):
        weight.tensor()
    assert weight.digest() != weight.slice(0, 0, 2).digest()


def test_tensors_are_shared_not_copied() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    weight = Weight.from_tensor(tensor)
    assert weight.tensor().data_ptr() == tensor.data_ptr()
    assert weight.slice(0, 1, 3).tensor().data_ptr() == tensor[1:].data_ptr()
    assert weight.cast(torch.float32) is weight
    assert not Weight.from_tensor(torch.nn.Parameter(tensor)).tensor().requires_grad
    assert isinstance(Weight.from_tensor(tensor.to("meta")).source, MetaSource)
    assert weight.shares_storage(weight.slice(0, 0, 1)) and not weight.shares_storage(
        Weight.from_tensor(tensor.clone())
    )


@pytest.mark.parametrize("offset", [0, 1, 6, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int8, torch.complex64], ids=str)
def test_files_at_any_offset(tmp_path: Path, offset: int, dtype: torch.dtype) -> None:
    """The range of a file, aligned or not, is the tensor; the same numbers in memory have the same hash."""
    tensor = (torch.arange(12).reshape(3, 4) % 3).to(dtype)
    weight = _file(tmp_path / "w.bin", tensor, offset)
    assert torch.equal(weight.tensor(), tensor)
    assert b"".join(bytes(c) for c in weight.chunks(limit=5)) == bytes(tensor.reshape(-1).view(torch.uint8))
    assert weight.digest() == Weight.from_tensor(tensor).digest()
    assert weight.shares_storage(weight.slice(0, 0, 1))


def test_a_file_is_never_written(tmp_path: Path) -> None:
    """PyTorch has no read-only tensors: a stray in-place write must stay in memory."""
    weight = _file(tmp_path / "w.bin", torch.ones(4))
    before = (tmp_path / "w.bin").read_bytes()
    weight.tensor().zero_()
    assert (tmp_path / "w.bin").read_bytes() == before
    assert torch.equal(weight.tensor(), torch.ones(4))


def test_missing_short_and_changed_files(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    weight = _file(path, torch.ones(4))
    path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(ImportModelError, match="cannot read 16 bytes at offset 0"):
        weight.tensor()
    with pytest.raises(ImportModelError, match="ends 9 bytes early"):
        list(weight.chunks())
    path.unlink()
    for read in (weight.tensor, lambda: list(weight.chunks()), Weight(weight.source).digest):
        with pytest.raises(ImportModelError, match="check that the file is complete"):
            read()
    assert torch.equal(Weight.from_file(path, 0, [0, 3], torch.int32).tensor(), torch.empty(0, 3, dtype=torch.int32))


def test_a_replaced_file_is_refused(tmp_path: Path) -> None:
    """Offsets belong to one version of a file; another one may hold other tensors there."""
    path = tmp_path / "w.bin"
    _file(path, torch.ones(4))
    weight = Weight(FileSource(path, 0, (4,), torch.float32, file_version(path)))
    assert torch.equal(weight.tensor(), torch.ones(4))
    _file(tmp_path / "other.bin", torch.zeros(4))
    (tmp_path / "other.bin").replace(path)
    with pytest.raises(ImportModelError, match="was changed or replaced"):
        weight.tensor()
    with pytest.raises(ImportModelError, match="was changed or replaced"):
        list(weight.chunks())


def test_large_weights_are_hashed_by_samples_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit only samples are read, and a file, a tensor and an expression still agree."""
    from graphlathe.ir import weights

    monkeypatch.setattr(weights, "_SAMPLED_ABOVE_BYTES", 1000)
    monkeypatch.setattr(weights, "_SAMPLES", 4)
    monkeypatch.setattr(weights, "_SAMPLE_BYTES", 8)
    tensor = torch.arange(1024.0).reshape(32, 32)
    weight = _file(tmp_path / "w.bin", tensor, 3)
    turned = Weight.from_tensor(tensor.t().contiguous()).permute((1, 0))
    assert weight.digest() == Weight.from_tensor(tensor).digest() == turned.digest()
    ends = tensor.clone()
    ends[0, 0] += 1
    assert Weight.from_tensor(ends).digest() != weight.digest()
    ends = tensor.clone()
    ends[31, 31] += 1
    assert Weight.from_tensor(ends).digest() != weight.digest()


def test_digests_tell_shape_dtype_and_numbers_apart() -> None:
    base = torch.arange(4, dtype=torch.int32)
    others = [base.reshape(2, 2), base.view(torch.float32), base + 1, base.flip(0)]
    digests = {Weight.from_tensor(t).digest() for t in (base, *others)}
    assert len(digests) == 5 and all(len(d) == 8 for d in digests)


def test_random_weights_depend_on_the_name_alone() -> None:
    """Matrices keep the scale of what they multiply; vectors can be variances; integers can be indices or masks."""
    a, b = (Weight(RandomSource(name, (64, 256), torch.float64)) for name in ("a", "b"))
    assert torch.equal(a.tensor(), a.tensor()) and not torch.equal(a.tensor(), b.tensor())
    assert float(a.tensor().std()) == pytest.approx(1 / math.sqrt(256), rel=0.05)
    assert float(Weight(RandomSource("v", (1000,), torch.float32)).tensor().min()) > 0
    assert set(Weight(RandomSource("i", (50,), torch.int64)).tensor().tolist()) == {0, 1}
    assert Weight(RandomSource("s", (), torch.bool)).tensor().dtype == torch.bool


def test_equality_is_identity() -> None:
    source = TensorSource(torch.ones(2))
    assert Weight(source) != Weight(source)


def test_permutations_in_a_row_are_one_and_undo_one_another() -> None:
    base = Weight.from_tensor(torch.arange(24.0).reshape(2, 3, 4))
    turned = base.permute([2, 0, 1]).permute([1, 0, 2])
    assert len(turned.steps) == 1
    torch.testing.assert_close(turned.tensor(), base.tensor().permute(2, 0, 1).permute(1, 0, 2))
    assert turned.permute([0, 2, 1]).steps == ()
    assert base.permute([0, 1, 2]).steps == ()
    scaled = base.permute([2, 0, 1]).scale(2.0).permute([1, 2, 0])
    torch.testing.assert_close(scaled.tensor(), base.tensor() * 2)
