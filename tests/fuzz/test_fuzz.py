"""A fixed number of random cases of each kind; ``make fuzz`` runs others for as long as it is told."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.corruptions import DAMAGES, damage
from tests.fuzz.differential import check_fx, check_onnx
from tests.fuzz.fx_programs import FxCase, fx_cases
from tests.fuzz.onnx_graphs import Case, onnx_cases
from tests.fuzz.sandbox import MEMORY, Outcome, Sandbox
from tests.fuzz.valid_models import write_valid

EXAMPLES = 200
# The same cases every time; a failing one is printed as it is, since shrinking takes minutes.
FIXED = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@FIXED
@given(onnx_cases())
def test_onnx_graphs(case: Case) -> None:
    check_onnx(case)


@FIXED
@given(fx_cases())
def test_fx_programs(case: FxCase) -> None:
    check_fx(case)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid")
    write_valid(folder)
    return folder


@pytest.fixture(scope="module")
def sandbox(valid: Path) -> Iterator[Sandbox]:
    with Sandbox(valid / "control" / "model.onnx") as started:
        yield started


@pytest.mark.xdist_group("fuzz")
def test_damaged_files(valid: Path, sandbox: Sandbox) -> None:
    @FIXED
    @given(st.sampled_from(sorted(DAMAGES)), st.integers(0, 2**32 - 1))
    def check(kind: str, seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            outcome = sandbox.read(damage(valid, Path(folder) / "damaged", kind, seed))
        assert outcome.fine, outcome

    check()


@pytest.mark.xdist_group("fuzz")
class TestSandbox:
    """That a bad outcome would be seen."""

    @pytest.mark.parametrize(
        ("code", "kind"),
        [
            ("import time; time.sleep(60)", "hang"),
            ("import os; os.abort()", "crash"),
            ("import ctypes; ctypes.string_at(0)", "crash"),
            (f"bytearray({MEMORY + (64 << 20)})", "error"),
            ("raise ValueError('not ours')", "error"),
            ("raise GraphlatheError('too much') from MemoryError()", "memory"),
        ],
    )
    def test_bad_outcomes(self, valid: Path, sandbox: Sandbox, code: str, kind: str) -> None:
        found = sandbox.read(valid / "control" / "model.onnx", code)
        assert found.kind == kind and not found.fine, found

    def test_good_outcomes(self, valid: Path, sandbox: Sandbox, tmp_path: Path) -> None:
        assert sandbox.read(valid / "control" / "saved") == Outcome("read")
        (tmp_path / "none.onnx").write_bytes(b"no model")
        assert sandbox.read(tmp_path / "none.onnx").kind == "refused"


@pytest.mark.slow
def test_make_fuzz_starts_and_says_its_seed() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", "5", "--seed", "7"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SEED=7" in done.stdout
    assert re.search(r"^\d+ onnx", done.stdout, re.MULTILINE)
