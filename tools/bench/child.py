"""The process in which `measure_in_subprocess` runs a function: JSON in on stdin, JSON out on a pipe."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

from .measure import peak_memory


def main() -> None:
    """Run the function that stdin names, and answer with its time, peak memory and result."""
    request = json.load(sys.stdin)
    module, _, name = request["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    with peak_memory() as memory:
        start = time.perf_counter()
        result = function(**request["arguments"])
        seconds = time.perf_counter() - start
    with os.fdopen(int(sys.argv[1]), "w") as answer:
        json.dump(
            {"seconds": seconds, "peak_rss_bytes": memory.peak, "result": result},
            answer,
        )


if __name__ == "__main__":
    main()
