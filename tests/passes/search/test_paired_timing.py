"""Timing in turn, with a clock that the test turns itself."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import pytest

from graphlathe.ir.errors import GraphlatheError
from graphlathe.passes.search.paired_timing import ATTEMPTS, paired_rounds


class Machine:
    """Wall and CPU time; calls let them pass."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.log: list[str] = []
        self.stalls: dict[int, float] = {}

    def clock(self) -> tuple[float, float]:
        return self.wall, self.cpu

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.wall += seconds + self.stalls.get(len(self.log), 0.0)
            self.cpu += seconds
            self.log.append(name)

        return work


def test_calls_take_turns() -> None:
    machine = Machine()
    calls = {name: machine.call(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    rounds = paired_rounds(calls, repeats=9, clock=machine.clock)
    assert rounds == {"a": [1.0] * 9, "b": [2.0] * 9, "c": [3.0] * 9}
    timed = "".join(machine.log[6:])  # each is called twice beforehand
    assert timed == "abcbcacab" * 3


def test_short_calls_are_repeated_within_a_timing() -> None:
    machine = Machine()
    rounds = paired_rounds({"a": machine.call("a", 0.0005), "b": machine.call("b", 1.0)}, clock=machine.clock)
    assert rounds["a"] == pytest.approx([0.0005] * 9)
    assert machine.log.count("a") == 2 + 9 * 4
    assert machine.log.count("b") == 2 + 9


def test_disturbed_rounds_are_left_out_as_a_whole() -> None:
    machine = Machine()
    machine.stalls = {4 + 3: 0.5, 4 + 5: 5.0}  # the second call of the second round; the first call of a later one
    calls = {"a": machine.call("a", 1.0), "b": machine.call("b", 1.0)}
    rounds = paired_rounds(calls, repeats=9, clock=machine.clock)
    assert rounds == {"a": [1.0] * 9, "b": [1.0] * 9}
    machine.stalls = {len(machine.log) + 4 + 3: 0.25}
    assert sorted(paired_rounds(calls, repeats=9, clock=machine.clock)["a"])[-1] == 1.25  # below the limit of 1.3


def test_a_busy_machine_is_an_error() -> None:
    machine = Machine()
    machine.stalls = dict.fromkeys(range(10_000), 1.0)
    with pytest.raises(GraphlatheError, match=f"0 of {ATTEMPTS * 9} rounds were undisturbed"):
        paired_rounds({"a": machine.call("a", 1.0)}, clock=machine.clock)
    assert paired_rounds({"a": machine.call("a", 1.0)}, disturbed=math.inf, clock=machine.clock) == {"a": [2.0] * 9}


def test_too_few_rounds_are_an_error() -> None:
    with pytest.raises(GraphlatheError, match="repeats is 8\n  expected: at least 9"):
        paired_rounds({}, repeats=8)


def test_the_garbage_collector_comes_back() -> None:
    machine = Machine()
    seen: list[bool] = []
    work = machine.call("a", 1.0)
    paired_rounds({"a": lambda: (seen.append(gc.isenabled()), work())}, clock=machine.clock)
    assert seen[2:] == [False] * 9
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        paired_rounds({"a": lambda: 1 // 0}, clock=machine.clock)
    assert gc.isenabled()
