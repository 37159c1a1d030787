"""Small files that ask for very much: each is refused at once, with a reason; nothing overflows in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from graphlathe.ir.from_onnx import from_onnx, walk
from graphlathe.ir.from_onnx.limits import MOST_TURNS, ImportLimitError
from graphlathe.ir.program import Program

HEAD = '<ir_version: 8, opset_import: ["" : 17, "local" : 1]>\n'
BODY = (
    "<body: graph = body (int64 i, bool go, float[] c) => (bool more, float[] d) { more = Identity (go) d = Neg (c) }>"
)


def imported(text: str, folder: Path) -> Program:
    path = folder / "model.onnx"
    path.write_bytes(onnx.parser.parse_model(HEAD + text).SerializeToString())
    return from_onnx(path)


def constants(values: str, nodes: str, shape: str = "N") -> str:
    return f"g (float[{shape}] x) => (float[] y) <{values}> {{ {nodes} }}"


@pytest.mark.parametrize("trips", ["trips", '""'])
def test_endless_loop(trips: str, tmp_path: Path) -> None:
    text = constants(f"int64 trips = {{{MOST_TURNS + 1}}}, bool yes = {{1}}", f"y = Loop ({trips}, yes, x) {BODY}")
    with pytest.raises(ImportLimitError, match="would be unrolled"):
        imported(text, tmp_path)


def test_loops_in_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "MOST_UNROLLED", 100)
    inner = (
        f"d = Loop (trips, go, c) {BODY}".replace("(int64 i, bool go", "(int64 j, bool on")
        .replace("Identity (go)", "Identity (on)")
        .replace("float[] c) =>", "float[] e) =>")
        .replace("float[] d)", "float[] f)")
        .replace("d = Neg (c)", "f = Neg (e)")
    )
    outer = BODY.replace("d = Neg (c)", inner)
    text = constants("int64 trips = {12}, bool yes = {1}", f"y = Loop (trips, yes, x) {outer}")
    with pytest.raises(ImportLimitError, match="loops are too long"):
        imported(text, tmp_path)
    few = imported(text.replace("{12}", "{3}"), tmp_path)
    assert torch.equal(few.run({"x": torch.ones(2)})["y"], -torch.ones(2))  # nine times


def test_functions_that_call_each_other_too_often(tmp_path: Path) -> None:
    def text(levels: int) -> str:
        functions = "".join(
            f'<domain: "local", opset_import: ["" : 17, "local" : 1]> F{n} (a) => (c) '
            f"{{ b = {f'local.F{n - 1}' if n else 'Neg'} (a) c = {f'local.F{n - 1}' if n else 'Neg'} (b) }}\n"
            for n in range(levels)
        )
        return constants("", f"y = local.F{levels - 1} (x)").replace("<>", "") + "\n" + functions

    with pytest.raises(ImportLimitError, match=f"come to {2**60} nodes"):
        imported(text(60), tmp_path)
    assert torch.equal(imported(text(5), tmp_path).run({"x": torch.ones(2)})["y"], torch.ones(2))


def test_input_of_an_absurd_shape(tmp_path: Path) -> None:
    with pytest.raises(ImportLimitError, match=rf"'x' has the shape \[{2**40}, 3\]"):
        imported(f"g (float[{2**40}, 3] x) => (float[] y) {{ y = Neg (x) }}", tmp_path)


def test_recurrence_of_an_absurd_length(tmp_path: Path) -> None:
    text = constants(
        "float[1, 1, 1] w = {1}, float[1, 1, 1] r = {1}",
        'y = RNN <activations = ["Relu"], clip = 1.0, hidden_size = 1> (x, w, r)',
        f"{2**20}, 1, 1",
    )
    with pytest.raises(ImportLimitError, match="length of a recurrent layer"):
        imported(text, tmp_path)


@pytest.mark.parametrize("lengths", ["", ", one"])
def test_sequence_of_absurdly_many_parts(lengths: str, tmp_path: Path) -> None:
    text = constants(
        "int64 one = {1}, int64 at = {0}", f"s = SplitToSequence (x{lengths}) y = SequenceAt (s, at)", f"{2**20}"
    )
    with pytest.raises(ImportLimitError, match="SplitToSequence"):
        imported(text, tmp_path)


@pytest.mark.parametrize(
    "node", ["Add (big, big)", "Mul (big, big)", "Sub (low, big)", "Pow (big, big)", "ReduceProd <keepdims = 0> (two)"]
)
def test_whole_numbers_wrap_as_the_type_does(node: str, tmp_path: Path) -> None:
    """Shape arithmetic is done on the host, whose numbers have no end: or one power fills the memory."""
    text = constants(
        f"int64 big = {{{2**62 + 3}}}, int64 low = {{{-(2**63)}}}, int64[2] two = {{{2**62 + 3}, {2**61 + 5}}}",
        f"z = {node} c = Cast <to = 9> (x) y = Where (c, z, z)",
    ).replace("(float[] y)", "(int64[] y)")
    expected = ReferenceEvaluator(onnx.parser.parse_model(HEAD + text)).run(None, {"x": np.ones(2, np.float32)})[0]
    found = imported(text, tmp_path).run({"x": torch.ones(2)})["y"]
    if "Pow" not in node:  # which goes through floating point in some implementations
        assert torch.equal(found, torch.from_numpy(expected))


def test_broadcasting_of_known_numbers_stays_small(tmp_path: Path) -> None:
    numbers = ", ".join(map(str, range(40)))
    text = constants(
        f"int64[40] a = {{{numbers}}}, int64[1] one = {{1}}, int64[1] zero = {{0}}",
        "b = Unsqueeze (a, one) c = Add (a, b) d = ReduceSum <keepdims = 0> (c) e = Cast <to = 1> (d) y = Add (x, e)",
    )
    program = imported(text, tmp_path)
    assert program.run({"x": torch.zeros(2)})["y"].tolist() == [float(40 * 2 * sum(range(40)))] * 2
