"""``make fuzz``: random cases of each kind in turn, until the time is up; prints the seed."""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.corruptions import DAMAGES, damage
from tests.fuzz.differential import check_fx, check_onnx
from tests.fuzz.fx_programs import fx_cases
from tests.fuzz.onnx_graphs import onnx_cases
from tests.fuzz.sandbox import Sandbox
from tests.fuzz.valid_models import write_valid

KINDS = ("onnx", "fx", "files")
ROUND = 50
_SETTINGS = settings(
    max_examples=ROUND,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class _Fuzzer:
    """Counts cases, and keeps one failure of each kind of error."""

    def __init__(self, valid: Path, sandbox: Sandbox, end: float) -> None:
        self.valid = valid
        self.sandbox = sandbox
        self.end = end
        self.cases: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    def round(self, kind: str, seed: int) -> None:
        """`ROUND` cases of one kind."""
        strategy, check = {
            "onnx": (onnx_cases(), check_onnx),
            "fx": (fx_cases(), check_fx),
            "files": (st.tuples(st.sampled_from(sorted(DAMAGES)), st.integers(0, 2**32 - 1)), self._check_file),
        }[kind]

        @hypothesis.seed(seed)
        @_SETTINGS
        @given(strategy)
        def run(case: object) -> None:
            if time.monotonic() < self.end:
                self._one(kind, seed, check, case)

        run()

    def _check_file(self, case: tuple[str, int]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            outcome = self.sandbox.read(damage(self.valid, Path(folder) / "damaged", *case))
        assert outcome.fine, outcome

    def _one(self, kind: str, seed: int, check: Callable[..., None], case: object) -> None:
        self.cases[kind] += 1
        try:
            check(case)
        except Exception as error:
            name = f"{kind}: {type(error).__name__}: {str(error).strip().splitlines()[0][:60] if str(error) else ''}"
            self.failures[name] += 1
            if self.failures[name] == 1:
                print(f"\nFAILED: {case!r}\nagain: make fuzz SEED={seed}")
                traceback.print_exc(limit=-8, file=sys.stdout)
                sys.stdout.flush()


def main() -> int:
    """Run; 1 if anything failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; all unless given")
    options = parser.parse_args()
    kinds = options.kinds or KINDS
    if not set(kinds) <= set(KINDS):
        parser.error(f"kinds are {', '.join(KINDS)}")
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**31)
    print(f"SEED={seed}, {options.seconds:g} s", flush=True)
    warnings.simplefilter("ignore")
    logging.disable()  # PyTorch tells at length of every trace that failed
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        valid = Path(folder)
        write_valid(valid)
        with Sandbox(valid / "control" / "model.onnx") as sandbox:
            fuzzer = _Fuzzer(valid, sandbox, time.monotonic() + options.seconds)
            while time.monotonic() < fuzzer.end:
                for kind in kinds:
                    fuzzer.round(kind, seed)
                print(f"{sum(fuzzer.cases.values())} cases, {sum(fuzzer.failures.values())} failed", flush=True)
                seed += 1
    print(", ".join(f"{n} {kind}" for kind, n in fuzzer.cases.items()))
    for name, times in fuzzer.failures.most_common():
        print(f"{times} x {name}")
    return 1 if fuzzer.failures else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
