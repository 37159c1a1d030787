"""What `optimize` refuses to compress with leaves nothing behind, whatever it was to write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from graphlathe.ir.from_torch import trace
from graphlathe.tools.cli import execute
from tests.passes.channels.tiny import Attention, Mlp, data, stack

QUICK = "generations=1 offspring=2"
PRESETS = {
    "flap": "flap{ratio=0.3}",
    "comp": "comp{ratio=0.3}",
    "tyr": f"tyr{{ratio=0.3 iterations=1 {QUICK}}}",
    "compress": "compress{ratio=0.3}",
    "branches": "compress{sites=mlp,drop-attention ratio=0.3 steps=2 allocator=knapsack rank=2}",
    "evopress": f"evopress{{ratio=0.3 {QUICK}}}",
    "sparsity": f"evopress{{mode=sparsity ratio=0.3 levels=2 {QUICK}}}",
    "bits": f"evopress{{mode=bits ratio=0.3 {QUICK}}}",
    "shortgpt": "shortgpt{blocks=1}",
    "window": "shortgpt{blocks=2 window}",
    "rocket": "rocket{ratio=0.3}",
    "shrp": "shrp{heads=1}",
    "distill": "distill{steps=2}",
}
DATA = {
    "wrong shape": ("shape", "shape.npz': input 'x' has size 5 in dimension 2"),
    "wrong type": ("type", "type.npz': input 'x' has dtype torch.float32"),
    "another name": ("name", "name.npz': unknown input 'y'"),
    "no rows": ("rows", "rows.npz': dimension B is 0"),
    "no arrays": ("none", "none.npz': missing input 'x'"),
    "an empty file": ("bytes", "cannot read arrays from"),
}
BUDGETS = {
    "flap": ("flap{target=1}", "the budget of 1 params is out of reach"),
    "comp": ("comp{target=1}", "the budget of 1 params is out of reach"),
    "tyr": (f"tyr{{target=1 iterations=1 {QUICK}}}", "the budget of 1 params is out of reach"),
    "compress": ("compress{target=1 budget=macs}", "the budget of 1 macs is out of reach"),
    "evolution": (f"compress{{target=1 allocator=evolution {QUICK}}}", "the budget of 1 params is out of reach"),
    "evopress": (f"evopress{{target=1 {QUICK}}}", "the budget of 1 params is out of reach"),
    "sparsity": (f"evopress{{mode=sparsity target=1 levels=2 {QUICK}}}", "the budget of 1 nonzeros is out of reach"),
    "bits": (f"evopress{{mode=bits target=1 {QUICK}}}", "the budget of 1 bytes is out of reach"),
    "shortgpt": ("shortgpt{blocks=9}", "9 of 2 blocks are to go"),
    "rocket": ("rocket{target=1}", "the budget of 1 params is out of reach"),
}
CASES = {
    **{f"NaN, {name}": (pipeline, "nan", "NaN") for name, pipeline in PRESETS.items()},
    **{what: (PRESETS["compress"], file, message) for what, (file, message) in DATA.items()},
    **{f"budget, {name}": (pipeline, "good", message) for name, (pipeline, message) in BUDGETS.items()},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of four blocks, and files to calibrate on."""
    folder = tmp_path_factory.mktemp("files")
    blocks = Attention(4, 4), Mlp(8), Attention(4, 4), Mlp(8)
    trace(stack(*blocks), data(1)[0], dynamic={"x": {0: "B", 1: "S"}}).save(folder / "model")
    good = data(1)[0]["x"].numpy()
    nan = good.copy()
    nan[0, 0, 0] = np.nan
    for name, array in {"good": good, "nan": nan, "shape": good[..., :5], "type": good.astype(np.float32)}.items():
        np.savez(folder / f"{name}.npz", x=array)
    np.savez(folder / "name.npz", y=good)
    np.savez(folder / "rows.npz", x=good[:0])
    np.savez(folder / "none.npz")
    (folder / "bytes.npz").write_bytes(b"")
    return folder


@pytest.mark.parametrize(("pipeline", "file", "message"), CASES.values(), ids=CASES)
def test_one_message_and_nothing_written(
    pipeline: str,
    file: str,
    message: str,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["-c", str(files / "good.npz"), "-c", str(files / f"{file}.npz")]
    wanted = ["-o", "small.onnx", "--plan", "plan.json", "--plot", "pictures", "--html", "a.html", "--report", "a.json"]
    assert execute(["optimize", str(files / "model"), "-p", pipeline, *given, *wanted]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("error:") == 1 and "Traceback" not in err
    assert message in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []
