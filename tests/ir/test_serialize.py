"""Saved programs: complete, shared storage once, atomic, lazy, and clear about damage. No pickle."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from graphlathe.ir import serialize
from graphlathe.ir.errors import ExportError, GraphlatheError, ImportModelError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.serialize import GRAPH, MANIFEST, WEIGHTS, load, save
from graphlathe.ir.text import parse_program, print_program
from graphlathe.ir.verify import verify
from graphlathe.ir.weights import FileSource, MetaSource, Weight
from tests.strategies import feeds_of, programs


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False] * 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(ids)) * self.mask)


@pytest.fixture
def program() -> Program:
    result = trace(_Tied().eval(), (torch.zeros(2, 5, dtype=torch.int64),), dynamic={"ids": {0: "B", 1: "S"}})
    result.history.append("dce")
    result.metadata["source"] = "a test, with ünïcode"
    return result


def test_round_trip(program: Program, tmp_path: Path) -> None:
    """Text with origins, fingerprint, history, ties, metadata and numbers survive."""
    folder = program.save(tmp_path / "model")
    again = Program.load(folder)
    assert sorted(p.name for p in folder.iterdir()) == [GRAPH, MANIFEST, WEIGHTS]
    assert again.fingerprint() == program.fingerprint()
    assert print_program(again, origins=True) == print_program(program, origins=True)
    assert again.tied == program.tied == {"embed.weight": "head.weight"}
    assert again.metadata == program.metadata
    verify(again, 3, reference=program, feeds=[{"ids": torch.arange(12).reshape(3, 4)}], tol=0.0)


@given(program=programs())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_programs_round_trip(program: Program, tmp_path: Path) -> None:
    again = load(save(program, tmp_path / "model"))
    assert again.fingerprint() == program.fingerprint()
    verify(again, 3, reference=program, feeds=[feeds_of(program)], tol=0.0)


def test_weights_are_lazy_and_storage_is_shared(program: Program, tmp_path: Path) -> None:
    """Loading reads the header only; a tied weight is one tensor of the file; other tools can read the file."""
    folder = save(program, tmp_path / "model")
    again = load(folder)
    assert all(isinstance(w.source, FileSource) and not w.steps for w in again.weights.values())
    stored = safetensors.torch.load_file(folder / WEIGHTS)
    assert set(stored) == {"head.weight", "inner.weight", "inner.bias", "mask"}
    for name, tensor in stored.items():
        assert torch.equal(tensor, program.weights[name].tensor())
        offset = again.weights[name].source.offset  # type: ignore[union-attr]
        assert offset % tensor.element_size() == 0
    assert not (folder / WEIGHTS).read_bytes().startswith(b"\x80")
    assert b"pickle" not in (folder / MANIFEST).read_bytes()


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    ],
    ids=str,
)
def test_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit-equal in every element type, also those that the file format has no name for; scalars and empty ones too."""
    values = torch.arange(24).reshape(4, 6) % 5
    weights = {
        "matrix": Weight.from_tensor(values.to(dtype)),
        "scalar": Weight.from_tensor(torch.ones(()).to(dtype)),
        "empty": Weight.from_tensor(torch.ones(0, 3).to(dtype)),
        "turned": Weight.from_tensor(values.to(dtype).t()),
    }
    program = _holding(weights)
    again = load(save(program, tmp_path / "model"))
    for name, weight in weights.items():
        found = again.weights[name]
        assert (found.shape, found.dtype, found.digest()) == (weight.shape, weight.dtype, weight.digest())
        a, b = found.tensor().contiguous(), weight.tensor().contiguous()
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _holding(weights: dict[str, Weight]) -> Program:
    """A program that returns its weights."""
    from graphlathe.ir.types import dtype_name

    lines = [
        f'  %w{i} = weight "{name}" : {dtype_name(w.dtype)}[{", ".join(map(str, w.shape))}] #00000000'
        for i, (name, w) in enumerate(weights.items())
    ]
    outputs = ", ".join(f"%out{i}" for i in range(len(weights)))
    values = ", ".join(f"%w{i}" for i in range(len(weights)))
    text = f"program @main(%x: f32[1]) -> ({outputs}) {{\n" + "\n".join(lines) + f"\n  return ({values},)\n}}\n"
    return parse_program(text, weights)


def test_expressions_over_one_source_are_stored_once(tmp_path: Path) -> None:
    """A matrix and its transpose, or overlapping slices, cost one copy; disjoint small slices of a large one do not."""
    big = Weight.from_tensor(torch.arange(4096.0).reshape(64, 64))
    shared = {
        "a": big,
        "b": big.permute((1, 0)),
        "c": big.slice(0, 4, 60).select(1, [3, 1]).scale(2.0).cast(torch.float64),
    }
    folder = save(_holding(shared), tmp_path / "shared")
    assert (folder / WEIGHTS).stat().st_size < 4096 * 4 + 400
    again = load(folder)
    for name, weight in shared.items():
        assert torch.equal(again.weights[name].tensor(), weight.tensor())
    cut = {"a": big.slice(0, 0, 2), "b": big.slice(0, 10, 12), "again": big.slice(0, 10, 12).reshape((128,))}
    folder = save(_holding(cut), tmp_path / "cut")
    assert (folder / WEIGHTS).stat().st_size < 3 * 128 * 4 + 600
    again = load(folder)
    for name, weight in cut.items():
        assert torch.equal(again.weights[name].tensor(), weight.tensor())


def test_saving_again_replaces_the_folder(program: Program, tmp_path: Path) -> None:
    """A new version takes the place of the old one at once; whoever still reads the old one is told."""
    folder = save(program, tmp_path / "model")
    old = load(folder)
    changed = program.clone()
    changed.weights["inner.bias"] = Weight.from_tensor(torch.zeros(8))
    save(changed, folder)
    assert load(folder).fingerprint() == changed.fingerprint() != program.fingerprint()
    assert os.listdir(tmp_path) == ["model"]
    with pytest.raises(ImportModelError, match="was changed or replaced after the weights were opened"):
        old(torch.zeros(1, 1, dtype=torch.int64))


def test_a_folder_that_the_program_reads_is_not_overwritten(program: Program, tmp_path: Path) -> None:
    folder = save(program, tmp_path / "model")
    again = load(folder)
    with pytest.raises(ExportError, match="the program reads its weights from"):
        save(again, folder)
    assert save(again, tmp_path / "copy").is_dir()
    assert load(tmp_path / "copy").fingerprint() == program.fingerprint()


def test_other_folders_are_not_overwritten(program: Program, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("a file")
    for name in ("precious", "file"):
        with pytest.raises(ExportError, match="exists and is no saved program"):
            save(program, tmp_path / name)
    assert (tmp_path / "precious" / "thesis.tex").read_text() == "years"
    (tmp_path / "empty").mkdir()
    assert save(program, tmp_path / "empty") == tmp_path / "empty"


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files may grow to 1 KiB and no further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_behind(program: Program, tmp_path: Path, small_disk: None) -> None:
    with pytest.raises(ExportError, match="free some space"):
        save(program, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_a_failure_keeps_the_old_version(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the last step fails, the folder is what it was."""
    folder = save(program, tmp_path / "model")
    real = os.rename

    def refuse(source: str | Path, target: str | Path) -> None:
        if Path(target) == folder and ".old." not in str(source):
            raise OSError("no more renames")
        real(source, target)

    monkeypatch.setattr(serialize.os, "rename", refuse)
    changed = program.clone()
    changed.weights["inner.bias"] = Weight.from_tensor(torch.zeros(8))
    with pytest.raises(ExportError, match="no more renames"):
        save(changed, folder)
    monkeypatch.undo()
    assert load(folder).fingerprint() == program.fingerprint()
    assert os.listdir(tmp_path) == ["model"]


def test_weights_without_numbers_are_refused(program: Program, tmp_path: Path) -> None:
    program.weights["inner.bias"] = Weight(MetaSource((8,), torch.float32))
    with pytest.raises(ExportError, match=r"'inner\.bias' has no numbers"):
        save(program, tmp_path / "model")
    del program.weights["inner.bias"]
    with pytest.raises(ExportError, match=r"no weight 'inner\.bias'"):
        save(program, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_a_missing_file_is_named(program: Program, tmp_path: Path) -> None:
    for name in (GRAPH, MANIFEST, WEIGHTS):
        folder = save(program, tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(ImportModelError, match=name):
            load(folder)
    with pytest.raises(ImportModelError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("left", [0, 4, 40, -1])
def test_truncated_weights_are_noticed_at_loading(program: Program, tmp_path: Path, left: int) -> None:
    path = save(program, tmp_path / "model") / WEIGHTS
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ImportModelError, match=r"truncated|is no safetensors file"):
        load(path.parent)


def test_damaged_manifests_are_refused(program: Program, tmp_path: Path) -> None:
    folder = save(program, tmp_path / "model")
    good = json.loads((folder / MANIFEST).read_text())

    def with_mask(**changes: object) -> object:
        return {**good, "weights": {**good["weights"], "mask": {**good["weights"]["mask"], **changes}}}

    bad: list[tuple[object, str]] = [
        ("{", "is damaged"),
        ([], "is damaged"),
        ({**good, "format": 2}, "has format 2"),
        ({**good, "weights": {}}, "no weight"),
        ({**good, "weights": {"mask": {}}}, "does not fit"),
        (with_mask(tensor="gone"), "does not fit"),
        (with_mask(shape=[9]), "does not fit"),
        (with_mask(dtype="f99"), "does not fit"),
        (with_mask(steps=[["eval", {}]]), "does not fit"),
        (with_mask(steps=[["slice", {"dim": 0}]]), "does not fit"),
        (with_mask(steps=[["permute", {"dims": [0, 1, 2]}]]), "does not fit"),
        (with_mask(steps=[["reshape", {"shape": [3]}]]), "does not fit"),
    ]
    for manifest, message in bad:
        (folder / MANIFEST).write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
        with pytest.raises(ImportModelError, match=message):
            load(folder)


def test_damaged_text_shows_the_line(program: Program, tmp_path: Path) -> None:
    folder = save(program, tmp_path / "model")
    text = (folder / GRAPH).read_text()
    (folder / GRAPH).write_text(text.replace("aten.embedding", "aten.embeddin"))
    with pytest.raises(GraphlatheError, match=r"line \d+, column 3: unknown operator 'aten.embeddin'"):
        load(folder)


def test_writing_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file-backed weight is copied in pieces: it is never materialised."""
    path = tmp_path / "big.bin"
    data = torch.arange(1 << 16, dtype=torch.int32)
    path.write_bytes(data.numpy().tobytes())
    weight = Weight.from_file(path, 0, [1 << 16], torch.int32)
    program = _holding({"big": weight})

    def never(self: Weight) -> torch.Tensor:
        raise AssertionError("materialised")

    monkeypatch.setattr(Weight, "tensor", never)
    folder = save(program, tmp_path / "model")
    monkeypatch.undo()
    assert torch.equal(load(folder).weights["big"].tensor(), data)
