"""Size 1: where a model's own code would take another way, and whether that matters.

Tracing takes 0 and 1 for constants, so every dynamic size is at least 2 while the model runs, and ``if length == 1``
is answered once and for all, without a guard. Most such branches only save work (a causal mask for one token). So what
the model's code asked is recorded; where the answer would be another one at size 1, the model and the program are both
run there, and if they differ, size 1 is out of the signature.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import uninteresting_files

from .calling import leaf_names
from .errors import GraphlatheError
from .program import Program

_TORCH = str(Path(torch.__file__).parent)
# These stand between the model's code and what it asks.
_BETWEEN = tuple(f"{_TORCH}/{part}" for part in ("__init__.py", "fx/experimental/"))


@contextmanager
def recorded_branches() -> Generator[list[sympy.Basic]]:
    """Collect the conditions on sizes that code outside PyTorch asks (``if``, ``and``, ``max``, ``torch._check``)."""
    asked: list[sympy.Basic] = []

    def listening(method: Callable[..., Any]) -> Callable[..., Any]:
        def ask(node: SymNode, *args: Any, **kwargs: Any) -> Any:
            if _asked_by_the_model():
                asked.append(node.expr)
            return method(node, *args, **kwargs)

        return ask

    # PyTorch looks at the model's own frame (to tell an ``assert``), past those of files that it knows to skip.
    uninteresting_files().add(__file__)
    originals = {name: getattr(SymNode, name) for name in ("bool_", "guard_bool", "expect_true")}
    for name, method in originals.items():
        setattr(SymNode, name, listening(method))
    try:
        yield asked
    finally:
        uninteresting_files().discard(__file__)
        for name, method in originals.items():
            setattr(SymNode, name, method)


def _asked_by_the_model() -> bool:
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return frame is not None and not frame.f_code.co_filename.startswith(_TORCH)


def restrict_sizes(
    program: Program,
    model: torch.nn.Module,
    asked: list[sympy.Basic],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    arguments: list[str],
) -> None:
    """Take size 1 out of the range of every dimension at which the model would do something else.

    Models without numbers (on the meta device) cannot be run: their ranges stay.

    Args:
        program: what was traced.
        model: what it was traced from, in eval mode.
        asked: the conditions that its code asked.
        args, kwargs: the example.
        arguments: their names.
    """
    entry = program.main
    env = program.fake_mode.shape_env
    if env is None:
        return
    conditions = {condition for expr in asked for condition in [env.replace(expr)] if condition.free_symbols}
    hints = {dim.symbol: sympy.Integer(dim.hint) for dim in entry.dims.by_name.values()}
    for name, dim in list(entry.dims.by_name.items()):
        about = [c for c in conditions if dim.symbol in c.free_symbols and c.free_symbols <= hints.keys()]
        flips = any(_flips(condition, hints, dim.symbol) for condition in about)
        if dim.min <= 1 and flips and _has_numbers(model, args, kwargs):
            axes = {
                (port, axis)
                for port, node in zip(entry.inputs, entry.placeholders, strict=True)
                for axis, size in enumerate(node.meta["val"].shape)
                if isinstance(size, torch.SymInt) and size.node.expr == dim.symbol
            }
            if not _same_at_one(program, model, _narrowed(args, kwargs, arguments, axes), len(args)):
                entry.dims.by_name[name] = replace(dim, min=2)


def _flips(condition: sympy.Basic, hints: Mapping[sympy.Symbol, sympy.Integer], symbol: sympy.Symbol) -> bool:
    """Whether a condition has another answer where one size is 1 and the others are the example's."""
    try:
        return condition.xreplace(dict(hints)) != condition.xreplace({**hints, symbol: sympy.Integer(1)})
    except (ArithmeticError, AssertionError):
        return True  # it makes no sense there: a division by zero, a negative size


def _has_numbers(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, dict(kwargs)))]
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta for t in tensors if torch.is_tensor(t))


def _narrowed(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], arguments: list[str], axes: set[tuple[str, int]]
) -> dict[str, Any]:
    """The example with size 1 along the given axes."""
    result: dict[str, Any] = {}
    for argument, value in zip(arguments, (*args, *kwargs.values()), strict=True):
        ports = iter(leaf_names(argument, value))

        def narrow(leaf: Any, ports: Iterator[str] = ports) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            port = next(ports)
            for axis in range(leaf.dim()):
                if (port, axis) in axes:
                    leaf = leaf.narrow(axis, 0, 1)
            return leaf.clone()

        result[argument] = pytree.tree_map(narrow, value)
    return result


def _same_at_one(program: Program, model: torch.nn.Module, call: Mapping[str, Any], positional: int) -> bool:
    from .verify import TOLERANCE, output_error

    values = list(call.values())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()} if program.main.state else {}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            state = torch.get_rng_state()
            got = [v for v in program.run(program.feeds(**call)).values() if isinstance(v, torch.Tensor)]
            torch.set_rng_state(state)
            answer = model(*values[:positional], **dict(list(call.items())[positional:]))
    except GraphlatheError:
        return True  # the program refuses that size as it is
    except Exception:
        return False  # the model does
    finally:
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
    wanted = [leaf for leaf in _leaves(answer) if isinstance(leaf, torch.Tensor)]
    return len(wanted) <= len(got) and all(
        output_error(a, b) <= TOLERANCE.get(b.dtype, 0.0) for a, b in zip(got, wanted, strict=False)
    )


def _leaves(answer: Any) -> list[Any]:
    from .from_torch import plain_output

    return pytree.tree_leaves(plain_output(answer))
