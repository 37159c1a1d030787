"""The scaffold of a pass: three places, valid code, and a test that fails until the pass is written."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from graphlathe.passes.base import Effect, Pass, options_of
from graphlathe.tools.new_pass import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "passes" / "layers").mkdir(parents=True)
    (tmp_path / "passes" / "layers" / "__init__.py").write_text("")
    shutil.copy(ROOT / "passes" / "registry.py", tmp_path / "passes")
    return tmp_path


@pytest.mark.parametrize("effect", ["approximate", "exact"])
def test_the_three_places(
    repository: Path, effect: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["merge-pairs", "layers", "--effect", effect, "--root", str(repository)]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "passes/layers/merge_pairs.py",
        "passes/registry.py",
        "tests/passes/layers/test_merge_pairs.py",
    ]
    registry = (repository / "passes" / "registry.py").read_text()
    tree = ast.parse(registry)
    table = next(n for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "BUILTIN")
    entries = ast.literal_eval(table.value)  # type: ignore[arg-type]
    assert entries["merge-pairs"] == ".layers.merge_pairs:MergePairs"
    assert list(entries) == sorted(entries)
    test = ast.parse((repository / "tests/passes/layers/test_merge_pairs.py").read_text())
    assert any(isinstance(n, ast.FunctionDef) and n.name == "test_hit" for n in test.body)
    # The pass imports where it belongs, is a pass of that name, and says that it is not written yet.
    spec = importlib.util.spec_from_file_location(
        "graphlathe.passes.layers.merge_pairs", repository / "passes/layers/merge_pairs.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    cls: type[Pass] = module.MergePairs
    assert (cls.name, cls.effect) == ("merge-pairs", Effect(effect))
    assert [f.name for f in options_of(cls)] == ["strength"]
    with pytest.raises(NotImplementedError):
        cls().run(None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Merge", "layers"], "no pass name"),
        (["merge-pairs", "nowhere"], "no family 'nowhere'"),
        (["drop-layers", "layers"], "exists"),
    ],
)
def test_what_cannot_be_scaffolded(
    repository: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(repository.rglob("*"))
    assert main([*arguments, "--root", str(repository)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(repository.rglob("*")) == before
