"""optipfair as its documentation recommends: layers by measured importance, MLPs by peak-to-peak values with data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .base import Row
from .compress_modules import Transformer, parameters
from .compress_peers import load_peer
from .compress_reach import module_macs, reach, smallest_ratio
from .compress_subject import Case, Subject, export_module, subject_of
from .compress_work import Search


def depth(case: Mapping[str, Any], level: Mapping[str, Any], target: str) -> Row:
    """Remove the least important layers."""
    return _run(case, level, target, lambda tool, subject, module: _shallower(tool, subject, module, level["count"]))


def width(case: Mapping[str, Any], level: Mapping[str, Any], target: str) -> Row:
    """Remove a share of every gated MLP's neurons."""

    def change(tool: Any, subject: Subject, module: nn.Module) -> nn.Module:
        return reach(level, subject, lambda ratio: _narrower(tool, subject, subject.module(), ratio))[1]

    return _run(case, level, target, change)


def both(case: Mapping[str, Any], level: Mapping[str, Any], target: str) -> Row:
    """Half of the way by layers, the rest by neurons, as its README combines them."""

    def change(tool: Any, subject: Subject, module: nn.Module) -> nn.Module:
        total, block = parameters(module), parameters(Transformer(module).blocks[0])
        wanted = level["params"] or int(total * level["macs"] / module_macs(subject, module))
        count = max(1, round((total - wanted) / 2 / block))

        def make(ratio: float) -> nn.Module:
            return _narrower(tool, subject, _shallower(tool, subject, subject.module(), count), ratio)

        return smallest_ratio(make, lambda changed: parameters(changed) <= wanted)[1]

    return _run(case, level, target, change)


def _run(case: Mapping[str, Any], level: Mapping[str, Any], target: str, change: Any) -> Row:
    chosen = Case.from_json(case)
    subject = subject_of(chosen)
    tool = load_peer(chosen.peers, "optipfair")
    module = subject.module()
    search = Search(subject, module)
    with search:
        changed = change(tool, subject, module)
    export_module(subject, changed, target)
    return search.row()


def _shallower(tool: Any, subject: Subject, module: nn.Module, count: int) -> nn.Module:
    importance: dict[int, float] = tool.analyze_layer_importance(module, subject.calibration(), show_progress=False)
    least = sorted(importance, key=importance.__getitem__)[:count]
    changed: nn.Module = tool.prune_model(module, pruning_type="DEPTH", layer_indices=least, show_progress=False)
    return changed


def _narrower(tool: Any, subject: Subject, module: nn.Module, ratio: float) -> nn.Module:
    changed: nn.Module = tool.prune_model(
        module,
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100 * ratio,
        dataloader=subject.calibration(),
        show_progress=False,
    )
    return changed
