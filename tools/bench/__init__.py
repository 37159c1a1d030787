"""Benchmarks: ``graphlathe bench SUITE``. One file per suite; `base` says what a suite is."""
