"""Scaffold a pass: its file, its registry line, its test. Then write what it does.

    python -m graphlathe.tools.new_pass NAME FAMILY [--effect approximate]

NAME is the pass's name in pipelines (``drop-layers``), FAMILY a folder under ``passes/`` (``layers``). The new test
fails until the pass is written: that is its purpose.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ..ir.errors import GraphlatheError, PipelineError
from ..passes.base import Effect

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

_PASS = '''"""ONE SENTENCE: what changes.

THE FORMULA, and a small graph before and after.

Source: PAPER (AUTHORS YEAR, arXiv NUMBER), section.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar{self_import}

from ...ir.program import Program
from ..base import {base_imports}


@dataclass(frozen=True, kw_only=True)
class {cls}(Pass):
    """ONE SENTENCE for the catalogue."""

    name: ClassVar[str] = "{name}"
    effect: ClassVar[Effect] = Effect.{effect}{paper}

    strength: float = option(0.5, ge=0, le=1, help="WHAT IT MEANS")

    def check(self, program: Program, ctx: Context) -> None:
        """Refuse programs for which the pass makes no sense, saying what to do."""

    def run(self, program: Program, ctx: Context) -> Stats:
        """Change the program through a `Rewriter`; count hits, attempts and reasons for misses."""
        raise NotImplementedError

    def ensure(self, before: Program, program: Program, stats: Stats) -> None:
        """Check the pass's own law."""
{laws}'''

_LAWS = '''
    @classmethod
    def neutral(cls) -> Self:
        """WHY these settings equal the baseline."""
        return cls(strength=0.0)

    @classmethod
    def planted(cls) -> Case:
        """WHAT is planted, and must be found."""
        raise NotImplementedError
'''

_TEST = '''"""``{name}``: WHAT IT CHANGES, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable

from graphlathe.passes.{family}.{module} import {cls}

from tests.passes.rewriting import operators, rewritten

TEXT = """\\
program @main(%x: f32[B, 4]) -> (%out) {{
  dim B = 2 in [1, inf]
  %0 = aten.relu(%x) : f32[B, 4]
  return (%0,)
}}
"""


def test_hit(golden: Callable[[str, str], None]) -> None:
    _, after, stats = rewritten({cls}(), TEXT)
    assert stats.hits == 1
    assert operators(after) == []
    golden("passes/{name}", after.to_text())


# Still to write: a near miss with its reason, a shared weight, a value that is also an output.
'''


def scaffold(root: Path, name: str, family: str, effect: Effect) -> list[Path]:
    """Write a pass's three places.

    Args:
        root: the repository.
        name: the pass's name in pipelines.
        family: a folder under ``passes/``.
        effect: what it promises.

    Returns:
        The files written or changed.

    Raises:
        PipelineError: the name is malformed or taken, or there is no such family.
    """
    if not _NAME.fullmatch(name):
        raise PipelineError(f"'{name}' is no pass name", expected="lower-case words joined by '-', such as drop-layers")
    folder = root / "passes" / family
    if not (folder / "__init__.py").is_file():
        raise PipelineError(
            f"there is no family '{family}'",
            expected=f"one of: {', '.join(sorted(p.parent.name for p in (root / 'passes').glob('*/__init__.py')))}",
            remedy=f"make passes/{family}/__init__.py first, and add the package to pyproject.toml",
        )
    module, cls = name.replace("-", "_"), "".join(word.capitalize() for word in name.split("-"))
    file, test = folder / f"{module}.py", root / "tests" / "passes" / family / f"test_{module}.py"
    registry = root / "passes" / "registry.py"
    if file.exists() or test.exists() or f'    "{name}":' in registry.read_text(encoding="utf-8"):
        raise PipelineError(f"the pass '{name}' exists")
    chooses = effect is Effect.APPROXIMATE
    fields = {
        "cls": cls,
        "name": name,
        "module": module,
        "family": family,
        "effect": effect.name,
        "laws": _LAWS if chooses else "",
        "paper": '\n    paper: ClassVar[str] = "PAPER, arXiv NUMBER"' if chooses else "",
        "self_import": ", Self" if chooses else "",
        "base_imports": f"{'Case, ' if chooses else ''}Context, Effect, Pass, Stats, option",
    }
    file.write_text(_PASS.format(**fields), encoding="utf-8")
    test.parent.mkdir(parents=True, exist_ok=True)
    test.write_text(_TEST.format(**fields), encoding="utf-8")
    registry.write_text(
        _with_entry(registry.read_text(encoding="utf-8"), name, f".{family}.{module}:{cls}"), encoding="utf-8"
    )
    return [file, registry, test]


def _with_entry(text: str, name: str, where: str) -> str:
    """The registry's text with one more line, in alphabetical order."""
    lines = text.splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith("BUILTIN"))
    end = next(i for i in range(start, len(lines)) if lines[i].startswith("}"))
    lines[start + 1 : end] = sorted([*lines[start + 1 : end], f'    "{name}": "{where}",\n'])
    return "".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Scaffold a pass.")
    parser.add_argument("name")
    parser.add_argument("family")
    parser.add_argument("--effect", choices=[e.value for e in Effect], default=Effect.APPROXIMATE.value)
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository (default: here)")
    options = parser.parse_args(arguments)
    try:
        written = scaffold(options.root, options.name, options.family, Effect(options.effect))
    except GraphlatheError as error:
        print(error, file=sys.stderr)
        return 2
    for path in written:
        print(path.relative_to(options.root))
    print("then: write the pass and its test, `make goldens`, `graphlathe passes --markdown > docs/passes.md`")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
