"""PyTorch front end: ``nn.Module``, ``ExportedProgram`` or ``.pt2`` file to `Program`.

`torch.export` captures; this file makes the result ours: weights become lazy and shared, inputs and outputs get stable
names, dynamic dimensions the user's names, size guards go into the signature, and `ir.clean` removes what capture
leaves behind. The decomposition that usually follows an export takes twice the export's own time, so it is run only
where it changes something: on graphs with in-place operators.
"""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram

from .calling import leaf_names
from .dims import RESERVED
from .errors import GraphlatheError, ImportModelError, suggest
from .from_exported import from_exported
from .on_cpu import module_on_cpu, values_on_cpu
from .program import Program
from .size_one import recorded_branches, restrict_sizes

Dynamic = Mapping[str, Mapping[int, Any]] | str | None


def trace(
    model: torch.nn.Module | ExportedProgram | str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | torch.Tensor | None = None,
    *,
    dynamic: Dynamic = None,
) -> Program:
    """Trace a PyTorch model to a `Program`.

    Args:
        model: a module (traced in eval mode; its mode is restored), an ``ExportedProgram``, or a ``.pt2`` file. Of a
            module on an accelerator a copy on the CPU is traced: programs are held there, and compiled for a device.
        example_inputs: a tuple (positional), a dict (keyword) or one tensor. Only shapes and dtypes matter;
            nested structures of tensors are allowed; other values are fixed.
        dynamic: names of dynamic dimensions by input and axis, ``{"input_ids": {0: "B", 1: "S"}}`` (inputs that share
            a name share the size; a `torch.export.Dim` gives a range), or ``"auto"``: every dimension that the model
            lets be dynamic, or None: all sizes fixed. Size 1 is refused where the model does something else there
            (which a model without numbers, on the meta device, cannot tell).

    Returns:
        The program; its entry is called ``main``.

    Raises:
        ImportModelError: the model cannot be traced, or a named dimension cannot be dynamic.
    """
    if dynamic is not None and isinstance(model, (str, Path, ExportedProgram)):
        raise ImportModelError(
            "dynamic= is for tracing a module", remedy="an exported program's dimensions were decided at its export"
        )
    if isinstance(model, (str, Path)):
        return from_exported(load_pt2(Path(model)))
    if isinstance(model, ExportedProgram):
        return from_exported(model)
    if not isinstance(model, torch.nn.Module):
        raise ImportModelError(
            f"cannot trace a {type(model).__name__}",
            expected="an nn.Module, an ExportedProgram, or the path of a .pt2 file",
        )
    if example_inputs is None:
        raise ImportModelError(
            "tracing a module needs example_inputs", remedy="pass a tuple (positional) or a dict (keyword)"
        )
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, (Mapping, tuple, list)):
        raise ImportModelError(
            f"example_inputs is a {type(example_inputs).__name__}",
            expected="a tuple (positional), a dict (keyword) or one tensor",
        )
    by_keyword = isinstance(example_inputs, Mapping)
    args: tuple[Any, ...] = () if by_keyword else tuple(example_inputs)
    kwargs: dict[str, Any] = dict(example_inputs) if by_keyword else {}
    model, args, kwargs = module_on_cpu(model), values_on_cpu(args), values_on_cpu(kwargs)
    arguments = argument_names(model, args, kwargs)
    with recorded_branches() as asked:
        exported, names = _export(model, args, kwargs, arguments, dynamic)
    program = from_exported(exported, names=names)
    entry = program.main
    order = list(inspect.signature(model.forward).parameters)
    rank = {name: order.index(name) if name in order else len(order) for name in entry.arguments}
    entry.arguments = dict(sorted(entry.arguments.items(), key=lambda item: rank[item[0]]))
    for (port, axis), (name, _) in names.items():
        if name not in entry.dims.by_name:
            size = entry.input_node(port).meta["val"].shape[axis]
            raise ImportModelError(
                f"the model fixes a named dimension: {name}, axis {axis} of '{port}', can only be {size}",
                remedy="leave that dimension out of dynamic=, or give an example of another size",
            )
    with _eval_mode(model):
        restrict_sizes(program, model, asked, args, kwargs, arguments)
    return program


def argument_names(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """The callable's own names of the arguments given, positional ones first."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ImportModelError(
            f"the example inputs do not fit {type(model).__name__}.forward: {error}",
            expected=f"forward{inspect.signature(model.forward)}",
        ) from error
    names: list[str] = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names.extend(f"{name}_{i}" for i in range(len(value)))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            names.extend(value)
        else:
            names.append(name)
    positional = names[: len(args)]
    return positional + [n for n in kwargs if n not in positional]


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Any:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], arguments: list[str], dynamic: Dynamic
) -> tuple[ExportedProgram, dict[tuple[str, int], tuple[str, int]]]:
    """Export with the requested dynamic dimensions; also returns their (name, minimum) by (leaf name, axis)."""
    values = _own_tensors([*args, *kwargs.values()])
    named = _named_dims(arguments, values, dynamic)
    values = [_widen(value, name, named) for name, value in zip(arguments, values, strict=True)]
    shapes = [
        _dynamic_shapes(name, value, named, dynamic == "auto") for name, value in zip(arguments, values, strict=True)
    ]
    args, kwargs = tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))
    spec: Any = (*shapes[: len(args)], *shapes[len(args) :])
    by_name = dict(zip(arguments, spec, strict=True))
    hooks = [
        model.register_forward_pre_hook(_SameSizes(arguments, named), with_kwargs=True, prepend=True),
        model.register_forward_hook(lambda _module, _args, output: plain_output(output)),
    ]
    try:
        with _eval_mode(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                model,
                args,
                kwargs,
                dynamic_shapes=_match_signature(model, args, kwargs, by_name) if dynamic else None,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=False,
            )
    except GraphlatheError:
        raise
    except Exception as error:
        raise _trace_error(model, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    return exported, {key: (name, bounds[0]) for key, (name, bounds) in named.items()}


def _own_tensors(values: list[Any]) -> list[Any]:
    """Arrays as tensors, all contiguous, and each one an input of its own: what is given twice may differ in a call."""
    seen: set[int] = set()

    def own(leaf: Any) -> Any:
        leaf = torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf
        if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
            return leaf
        leaf = leaf.clone() if id(leaf) in seen else leaf
        seen.add(id(leaf))
        # torch.export marks dynamic dimensions on the tensors it is given, and leaves the marks there when it fails.
        return leaf.contiguous().detach()

    return [pytree.tree_map(own, value) for value in values]


def _match_signature(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], by_name: dict[str, Any]
) -> Any:
    """torch.export wants dynamic shapes keyed by parameter, with variadic ones grouped."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    result: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            result[name] = tuple(by_name[f"{name}_{i}"] for i in range(len(value)))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            if any(pytree.tree_leaves([by_name[key] for key in value])):
                raise ImportModelError(
                    f"dynamic names dimensions of {', '.join(value)}, which forward takes as **{name}",
                    remedy="torch.export cannot do that: wrap the model in a module that names its arguments",
                )
            result[name] = {key: by_name[key] for key in value}
        else:
            result[name] = by_name[name]
    return result


def _named_dims(arguments: list[str], values: list[Any], dynamic: Dynamic) -> dict[tuple[str, int], tuple[str, Any]]:
    """The requested dimensions: (leaf name, axis) -> (name, range)."""
    if dynamic is None or dynamic == "auto":
        return {}
    if not isinstance(dynamic, Mapping):
        raise ImportModelError(
            f"dynamic={dynamic!r} is unknown", expected="a dict of names by input and axis, 'auto', or None"
        )
    leaves: dict[str, torch.Tensor] = {}
    for argument, value in zip(arguments, values, strict=True):
        tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        leaves.update(zip(leaf_names(argument, value), tensors, strict=True))
    named: dict[tuple[str, int], tuple[str, Any]] = {}
    for port, axes in dynamic.items():
        if port not in leaves:
            raise ImportModelError(
                f"dynamic names no input '{port}'{suggest(port, list(leaves))}", expected=", ".join(leaves)
            )
        by_axis = axes if isinstance(axes, Mapping) else {i: dim for i, dim in enumerate(axes) if dim is not None}
        for axis, dim in by_axis.items():
            if not -leaves[port].dim() <= axis < leaves[port].dim():
                raise ImportModelError(
                    f"dynamic[{port!r}] names axis {axis}", expected=f"an axis of shape {list(leaves[port].shape)}"
                )
            name = dim if isinstance(dim, str) else getattr(dim, "__name__", None)
            if not isinstance(name, str) or not _is_dim_name(name) or hasattr(dim, "root"):
                raise ImportModelError(
                    f"dynamic[{port!r}][{axis}] is {dim!r}",
                    expected="the dimension's name (an ASCII identifier), or a torch.export.Dim with a range",
                )
            low, high = (getattr(dim, "min", 1), getattr(dim, "max", None)) if not isinstance(dim, str) else (1, None)
            named[port, axis % leaves[port].dim()] = (
                name,
                (max(int(low), 1), None if high is None or high > 2**31 else int(high)),
            )
    return named


def _is_dim_name(name: str) -> bool:
    """Whether sizes with this name print and read back."""
    reserved = keyword.iskeyword(name) or name in RESERVED
    return name.isidentifier() and name.isascii() and not reserved


def _widen(value: Any, argument: str, named: Mapping[tuple[str, int], Any]) -> Any:
    """Repeat the example along dynamic axes of size 1: 0 and 1 count as constants, and numbers do not matter."""
    names = iter(leaf_names(argument, value))

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        name = next(names)
        for axis in range(leaf.dim()):
            if (name, axis) in named and leaf.shape[axis] == 1:
                leaf = leaf.repeat_interleave(2, dim=axis)
        return leaf

    return pytree.tree_map(widen, value)


def _dynamic_shapes(argument: str, value: Any, named: Mapping[tuple[str, int], Any], auto: bool) -> Any:
    names = iter(leaf_names(argument, value))

    def shape(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        name = next(names)
        if auto:
            return {axis: torch.export.Dim.AUTO for axis in range(leaf.dim())}
        result: dict[int, Any] = {}
        for axis in range(leaf.dim()):
            if (name, axis) in named:
                low, high = named[name, axis][1]
                result[axis] = torch.export.Dim.DYNAMIC(min=low, max=high) if high else torch.export.Dim.DYNAMIC
        return result or None

    return pytree.tree_map(shape, value)


class _SameSizes:
    """A forward pre-hook that tells the tracer which dimensions carry one name, before the model sees them."""

    def __init__(self, arguments: list[str], named: Mapping[tuple[str, int], tuple[str, Any]]) -> None:
        self.arguments = arguments
        self.named = named

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves: dict[str, torch.Tensor] = {}
        positional = dict(zip(self.arguments, args, strict=False))
        for argument, value in {**positional, **kwargs}.items():
            tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            leaves.update(zip(leaf_names(argument, value), tensors, strict=True))
        first: dict[str, Any] = {}
        for (port, axis), (name, _) in self.named.items():
            size = leaves[port].shape[axis]
            torch._check(first.setdefault(name, size) == size)


def plain_output(value: Any) -> Any:
    """Dataclasses that PyTorch does not know as containers, as dicts of their fields; at any depth."""
    kind: Any = type(value)
    if dataclasses.is_dataclass(kind) and kind not in pytree.SUPPORTED_NODES:
        return {field.name: plain_output(getattr(value, field.name)) for field in dataclasses.fields(kind)}
    if kind in (list, tuple):
        return kind(plain_output(item) for item in value)
    if kind is dict:
        return {key: plain_output(item) for key, item in value.items()}
    return value


def _trace_error(model: torch.nn.Module, error: Exception) -> ImportModelError:
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    fixed = re.search(r"marked (\S+?) as dynamic but your code specialized it to be a constant \((\d+)\)", str(error))
    if fixed:
        return ImportModelError(
            f"the model fixes a named dimension: {fixed[1].replace('L[', '[')} can only be {fixed[2]}",
            remedy="leave that dimension out of dynamic=, or use dynamic='auto'",
        )
    return ImportModelError(
        f"cannot trace {type(model).__name__}: {type(error).__name__}: {first}",
        remedy="torch.export must be able to capture it: remove control flow on data, or trace a part of the model",
    )


def load_pt2(path: Path) -> ExportedProgram:
    """Read a ``.pt2`` file.

    Raises:
        ImportModelError: it is missing, truncated, or something else.
    """
    if not path.is_file():
        raise ImportModelError(f"no file '{path}'")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(str(path))
    except Exception as error:
        raise ImportModelError(
            f"cannot read '{path}': {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            expected="a file that torch.export.save wrote",
            remedy="the file may be truncated, or written by another version of torch: export it again",
        ) from error
