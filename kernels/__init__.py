"""Operators of ours, ``graphlathe::*``, for what ATen has no word for. One operator per file.

Nothing is imported here: in a checkout this folder is also found as a top-level package called ``kernels``, which other
libraries look for, and a second import would define the operators twice. `kernels.operators` lists them.
"""
