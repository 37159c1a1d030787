"""Build a `transformers` model without its weights, and find each parameter in the checkpoint.

Parameters are fake tensors on the CPU (shape and dtype, no storage); buffers are real, because rotary frequencies and
the like are computed, not stored. Names are matched by the library's own renaming rules; a parameter that the library
computes from several stored ones (fused experts, permuted projections) is not matched here.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .errors import ImportModelError, suggest
from .weights import Weight


def import_transformers() -> ModuleType:
    """The `transformers` library.

    Raises:
        ImportModelError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportModelError(
            "reading a checkpoint folder or a GGUF file needs transformers",
            remedy="install graphlathe with its extra 'hub': pip install 'graphlathe[hub]'",
        ) from error
    return transformers


@contextmanager
def fake_parameters(mode: FakeTensorMode) -> Generator[None, None, None]:
    """Within this context, every parameter that a module registers becomes a fake tensor."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and not isinstance(param, FakeTensor):
            self._parameters[name] = fake_parameter(mode, param.shape, param.dtype)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def fake_parameter(mode: FakeTensorMode, shape: Any, dtype: torch.dtype) -> nn.Parameter:
    """A parameter with shape and dtype, and no storage."""
    with mode:
        return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def architecture_class(config: Any) -> type[Any]:
    """The model class that a configuration names.

    Raises:
        ImportModelError: it names none, or one that the installed library does not have.
    """
    transformers = import_transformers()
    named = list(getattr(config, "architectures", None) or ())
    if not named:
        raise ImportModelError(
            f"the {config.model_type} configuration names no architecture",
            remedy='add "architectures": ["...ForCausalLM"] (the class that was trained) to config.json',
        )
    cls = getattr(transformers, named[0], None)
    if not isinstance(cls, type):
        raise ImportModelError(
            f"transformers {transformers.__version__} has no architecture '{named[0]}'"
            + suggest(named[0], dir(transformers)),
            remedy="install a version that has it; models with code of their own are not run "
            "(trace the module yourself with graphlathe.trace)",
        )
    return cls


def without_cache(config: Any) -> None:
    """Switch key-value caches off: a forward pass over a whole sequence is what is traced."""
    parts: list[Any] = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        if hasattr(part, "use_cache"):
            part.use_cache = False


def build_model(config: Any, dtype: torch.dtype) -> Any:
    """A model with fake parameters and real buffers, in eval mode; costs neither time nor memory for its weights."""
    from transformers.initialization import no_init_weights

    cls = architecture_class(config)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    without_cache(config)
    try:
        with no_init_weights(), fake_parameters(mode):
            model = cls._from_config(config, dtype=dtype)
            model.tie_weights()  # part of the initialization that was left out
    except Exception as error:
        raise ImportModelError(f"cannot build {cls.__name__}: {type(error).__name__}: {error}") from error
    _keep_in_float32(model, mode, dtype)
    return model.eval()


def _keep_in_float32(model: Any, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Some parameters (routers, T5's output projections) stay in float32 whatever the model's type is."""
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern = re.compile("|".join(name.replace("*", ".*") for name in plan))
    for name, parameter in list(model.named_parameters()):
        if pattern.search(name):
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = fake_parameter(mode, parameter.shape, torch.float32)


def match_weights(model: Any, stored: Mapping[str, Weight]) -> tuple[dict[str, Weight], list[str]]:
    """Find the model's parameters and persistent buffers among the stored tensors.

    Returns:
        The weights by the model's own names (in the model's dtype: a lazy cast where the file has another), and the
        names that could not be matched one to one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    state = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found: dict[str, Weight] = {}
    computed: set[str] = set()
    for key, weight in stored.items():
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name = key
        if converter is not None:
            computed.add(name)
        elif name in state and tuple(state[name].shape) == weight.shape:
            found[name] = weight.cast(state[name].dtype)
    for names in tied_names(model):
        first = next((found[name] for name in names if name in found), None)
        if first is not None:
            found.update({name: found.get(name, first) for name in names})
    for name in computed:
        found.pop(name, None)
    return found, [name for name in state if name not in found]


def tied_names(model: nn.Module) -> list[list[str]]:
    """Groups of parameter names that stand for one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def untie_where_different(model: nn.Module, found: Mapping[str, Weight]) -> list[str]:
    """Give tied parameters whose stored numbers differ a life of their own, as `from_pretrained` does.

    Returns:
        The names that are no longer tied.
    """
    untied: list[str] = []
    for first, *others in tied_names(model):
        for name in others:
            if first in found and name in found and not same_bytes(found[first], found[name]):
                owner, _, leaf = name.rpartition(".")
                module = model.get_submodule(owner)
                old = module._parameters[leaf]
                assert isinstance(old, FakeTensor)
                module._parameters[leaf] = fake_parameter(old.fake_mode, old.shape, old.dtype)
                untied.append(name)
    return untied


def same_bytes(a: Weight, b: Weight) -> bool:
    """Whether two weights hold the same numbers, comparing chunk by chunk (and not at all when they share storage)."""
    if a is b or (a.shares_storage(b) and a.steps == b.steps):
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(x == y for x, y in zip(a.chunks(), b.chunks(), strict=True))
