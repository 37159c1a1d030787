"""The process in which `measure_in_subprocess` runs a function: request on stdin, answer in a file, both JSON."""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from .measure import peak_memory


def main() -> None:
    """Run the function that stdin names, and answer with its time, peak memory and result, or with its error."""
    request = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        module, _, name = request["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        with peak_memory() as memory:
            start = time.perf_counter()
            result = function(**request["arguments"])
            seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "peak_rss_bytes": memory.peak, "result": result}
    except Exception as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}"}
    Path(request["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
