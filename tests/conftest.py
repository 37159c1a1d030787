"""What every test gets: no network, one thread per worker, and goldens."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before anything imports transformers, which reads it once: a test that would download fails at once instead.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

GOLDENS = Path(__file__).parent / "goldens"

# A slow machine is not a failing test; the example that failed is printed so that it can be rerun.
hypothesis.settings.register_profile("graphlathe", deadline=None, print_blob=True)
hypothesis.settings.load_profile("graphlathe")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write tests/goldens/ instead of comparing with it")


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers already fill the cores; more threads in each would only get in each other's way.
        torch.set_num_threads(1)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: the text equals ``tests/goldens/<name>.txt``; ``--update-goldens`` writes it instead."""
    update = bool(request.config.getoption("--update-goldens"))

    def compare(name: str, text: str) -> None:
        path = GOLDENS / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        else:
            assert path.exists(), f"no golden '{name}': write it with `make goldens`, and read it before you commit it"
            assert text == path.read_bytes().decode(), f"'{name}' changed: if that is meant, `make goldens`"

    return compare
