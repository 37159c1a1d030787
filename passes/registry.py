"""The catalogue of passes: name -> ``module:Class``, loaded when used; third parties add theirs by entry point."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points

from ..ir.errors import PipelineError, suggest
from .base import Pass

ENTRY_POINT_GROUP = "graphlathe.passes"

BUILTIN: dict[str, str] = {
    "apply-plan": ".search.apply_plan:ApplyPlan",
    "canonicalize": ".canonical.canonicalize:Canonicalize",
    "comp": ".channels.comp:Comp",
    "compress": ".channels.compress:Compress",
    "cse": ".canonical.cse:CommonSubexpressions",
    "dce": ".canonical.dce:DeadCode",
    "distill": ".weights.distill:Distill",
    "drop-layers": ".layers.drop_layers:DropLayers",
    "evopress": ".layers.evopress:EvoPress",
    "flap": ".channels.flap:Flap",
    "fold-batchnorm": ".canonical.fold_batchnorm:FoldBatchNorm",
    "fold-constants": ".canonical.fold_constants:FoldConstants",
    "raise": ".canonical.raise_all:RaiseAll",
    "raise-activations": ".canonical.raise_activations:RaiseActivations",
    "raise-attention": ".canonical.raise_attention:RaiseAttention",
    "raise-experts": ".canonical.raise_experts:RaiseExperts",
    "raise-linear": ".canonical.raise_linear:RaiseLinear",
    "raise-norms": ".canonical.raise_norms:RaiseNorms",
    "raise-rotary": ".canonical.raise_rotary:RaiseRotary",
    "remove-noops": ".canonical.remove_noops:RemoveNoops",
    "rocket": ".weights.rocket:Rocket",
    "shortgpt": ".layers.shortgpt:ShortGpt",
    "shrp": ".heads.shrp:Shrp",
    "tyr": ".channels.tyr:Tyr",
}

_registered: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Add a pass class to the catalogue (as a decorator, or called once).

    Raises:
        PipelineError: the name is taken by another class, or is empty.
    """
    if not cls.name:
        raise PipelineError(f"{cls.__name__} has no name", remedy="set `name: ClassVar[str]`")
    known = _registered.get(cls.name, cls)
    # A notebook's cell that runs again defines its class again.
    again = (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
    if cls.name in BUILTIN or not again:
        raise PipelineError(f"the pass name '{cls.name}' is taken", remedy="choose another name")
    _registered[cls.name] = cls
    return cls


@cache
def _plugins() -> dict[str, str]:
    found: dict[str, str] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in BUILTIN or point.name in found:
            raise PipelineError(
                f"two packages provide the pass '{point.name}' ({point.value})",
                remedy="uninstall one, or ask its author to rename it",
            )
        found[point.name] = point.value
    return found


def names() -> list[str]:
    """All pass names, sorted."""
    return sorted({*BUILTIN, *_plugins(), *_registered})


def get(name: str) -> type[Pass]:
    """The class of the pass ``name``.

    Raises:
        PipelineError: no such pass, or a plugin's module does not hold what it promises.
    """
    if name in _registered:
        return _registered[name]
    where = BUILTIN.get(name) or _plugins().get(name)
    if where is None:
        raise PipelineError(f"unknown pass '{name}'{suggest(name, names())}", expected=f"one of: {', '.join(names())}")
    module, _, attribute = where.partition(":")
    package = __package__ if module.startswith(".") else None
    try:
        cls = getattr(importlib.import_module(module, package), attribute)
    except (ImportError, AttributeError) as error:
        if name in BUILTIN:
            raise  # ours is broken, which a traceback explains better
        raise PipelineError(
            f"the plugin pass '{name}' ({where}) cannot be loaded: {error}", remedy="reinstall or remove the plugin"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Pass)) or cls.name != name:
        raise PipelineError(f"the pass '{name}' is registered as {where}, which is not a Pass of that name")
    return cls
