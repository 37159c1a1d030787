"""The folders at the top of the repository are installed inside ``graphlathe``: all of them, and nowhere else."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("ir", "kernels", "passes", "runtime", "tools")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Runs in the installed copy, in a folder outside the repository. `sys.argv[1]` is where the package must come from.
PROBE = """
import importlib, importlib.resources, importlib.util, pathlib, sys
import graphlathe
place = pathlib.Path(graphlathe.__file__).resolve()
assert place.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), place
for package in sys.argv[2:]:
    importlib.import_module(package)
for name in ("ir", "kernels", "passes", "runtime", "tools", "tests", "build"):
    spec = importlib.util.find_spec(name)
    origin = spec and (spec.origin or str(list(spec.submodule_search_locations)))
    # `build` is also the name of a development tool; what must not be there is a folder of ours.
    assert not origin or name == "build" and "site-packages" in origin, f"{name} leaks: {origin}"
assert importlib.resources.files("graphlathe").joinpath("py.typed").is_file()
assert importlib.resources.files("graphlathe.tools").joinpath("data/README.md").is_file()
"""


def package_folders() -> set[str]:
    """Dotted names, as installed, of every folder with an ``__init__.py``."""
    found = {"graphlathe"}
    for folder in FOLDERS:
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join(("graphlathe", *init.parent.relative_to(ROOT).parts)))
    return found


def test_every_package_is_listed() -> None:
    listed = SETTINGS["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(package_folders()), "complete `packages` in pyproject.toml"


def test_every_module_lies_in_a_package() -> None:
    """A folder without ``__init__.py`` imports fine in a checkout and is missing from the wheel."""
    data = ROOT / "tools" / "data"  # package data, beside its script
    for folder in FOLDERS:
        for module in (ROOT / folder).rglob("*.py"):
            if module.parent != data:
                assert (module.parent / "__init__.py").exists(), module.relative_to(ROOT)


def test_imports_inside_the_package_are_relative() -> None:
    """An absolute one works only where the package is installed, or worse, only where it is not."""
    wrong: list[str] = []
    for folder in ("graphlathe", *FOLDERS):
        for path in (ROOT / folder).rglob("*.py"):
            where = path.relative_to(ROOT)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                else:
                    continue
                for name in names:
                    if name.split(".")[0] in ("graphlathe", "tests", *FOLDERS):
                        wrong.append(f"{where}:{node.lineno}: {name}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked and new files, in a folder with a space in its name."""
    target = tmp_path_factory.mktemp("check out")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # not a file deleted but still in the index
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def archives(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, built from the source archive, and the source archive."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--outdir", out, checkout, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("packaging")
@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_installed(kind: str, request: pytest.FixtureRequest, checkout: Path, tmp_path: Path) -> None:
    """Imports, the command and the data work outside the repository, and nothing lands beside the package."""
    python = _environment(tmp_path / "venv")
    if kind == "editable":
        source, expected = ["--editable", checkout], checkout
    else:
        wheel, sdist = request.getfixturevalue("archives")
        source, expected = [wheel if kind == "wheel" else sdist], tmp_path / "venv"
    _run(python, "-m", "pip", "install", "--quiet", "--no-deps", *source, cwd=tmp_path)

    _run(python, "-c", PROBE, expected, *sorted(package_folders()), cwd=tmp_path)
    assert "Usage: graphlathe" in _run(python.with_name("graphlathe"), "--help", cwd=tmp_path)
    assert "Usage: graphlathe" in _run(python, "-m", "graphlathe", "--help", cwd=tmp_path)


def _environment(folder: Path) -> Path:
    """A virtual environment that also sees the packages of the one that runs the tests, but not its graphlathe."""
    _run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A path in a .pth file is searched after the environment's own packages, and its own .pth files (such as that of an
    # editable graphlathe) are not read.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def _run(*command: str | Path, cwd: Path) -> str:
    # Without the variables that would let the repository or other packages in.
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "COV"))}
    # The help is cut into lines and coloured by the terminal's properties.
    clean |= {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[:4]}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
