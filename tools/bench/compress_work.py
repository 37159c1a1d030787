"""How much a method computed, counted where PyTorch computes it: the multiplications of its matrix products.

Methods search in different ways: whole passes, passes from some block on, passes of candidates that lack blocks,
backward passes, products of statistics. Divided by what one token costs in the dense model, the count is the search's
cost in tokens, the same for every method and independent of what the method says about itself. What is computed
outside PyTorch (in ONNX Runtime) is not seen here; such a step counts its tokens itself. A `Search` adds the time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Self

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .base import Row
from .compress_subject import Subject

_aten = torch.ops.aten
_CPU_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward


def _attention_macs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Of ``softmax(q k') v``: [batch, heads, tokens, width]."""
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return pairs * (query.shape[-1] + value.shape[-1])


def _without_numbers(value: object) -> bool:
    return isinstance(value, torch.Tensor) and (isinstance(value, FakeTensor) or value.is_meta)


class WorkCounter(TorchDispatchMode):
    """Counts multiply-adds of matrix products, convolutions and attention while it is active, on this thread.

    Attributes:
        macs: multiply-adds so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if any(_without_numbers(each) for each in tree_leaves((args, given))):
            return func(*args, **given)  # shape inference computes nothing
        packet = func.overloadpacket if hasattr(func, "overloadpacket") else func
        if packet not in flop_registry and isinstance(func, torch._ops.OpOverload):
            # In inference mode a composite operator (matmul, linear) arrives whole: its parts are what is counted.
            with self:
                parts = func.decompose(*args, **given)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **given)
        if packet is _CPU_ATTENTION:
            self.macs += _attention_macs(*args[:3])
        elif packet is _CPU_ATTENTION_BACKWARD:
            self.macs += 5 * _attention_macs(*args[1:4]) // 2  # five products where the forward pass has two
        elif packet in flop_registry:
            count: Callable[..., int] = flop_registry[packet]
            self.macs += count(*args, **given, out_val=result) // 2
        return result


def count_macs(call: Callable[[], Any]) -> int:
    """Multiply-adds of a call, see `WorkCounter`."""
    with WorkCounter() as counter:
        call()
    return counter.macs


class Search:
    """What the code in ``with`` blocks costs: processor and wall seconds, and the work in units of the dense model.

    Args:
        subject: whose dense model's work on one unit (a token, an image) is the measure.
        module: the dense module, if it is there already.
    """

    def __init__(self, subject: Subject, module: torch.nn.Module | None = None) -> None:
        feeds = subject.example()
        dense = module or subject.module()
        with torch.no_grad():
            self._unit = count_macs(lambda: dense(**feeds)) / subject.units(feeds)
        self._counter = WorkCounter()
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> Search:
        self._start = time.perf_counter(), time.process_time()
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.process_time() - self._start[1]

    def row(self, outside: int = 0) -> Row:
        """The columns; ``outside`` are units that were computed where PyTorch does not see them."""
        units = round(self._counter.macs / self._unit) + outside
        return {"search_units": units, "search_seconds": self.seconds, "search_cpu_seconds": self.cpu_seconds}
