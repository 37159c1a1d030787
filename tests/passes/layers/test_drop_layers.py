"""``drop-layers`` against the eager model without those layers, against brute force, and over the zoo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from graphlathe.ir.errors import PipelineError, PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.ir.verify import relative_error, verify
from graphlathe.ir.weights import Weight
from graphlathe.passes.base import Context
from graphlathe.passes.fidelity import output_distance
from graphlathe.passes.layers.drop_layers import DropLayers
from graphlathe.passes.search.scores import block_influence, removal_loss
from graphlathe.passes.search.units import remaining_weights, removable_units, replacements
from graphlathe.tools import zoo
from tests.zoo_programs import SAMPLE, flat_outputs, module, over_zoo, traced

# Where the layers are in the eager models, for the reference only: the pass itself knows no names.
LAYERS: dict[str, str] = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "gptj": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gemma2": "model.layers",
    "bloom": "transformer.h",
    "bert": "encoder.layer",
    "vit": "layers",
    "mixtral": "model.layers",
    "mamba": "backbone.layers",
}


def _layer_list(model: nn.Module, path: str) -> nn.ModuleList:
    """The layers at ``path``, whatever head the zoo put around the base model."""
    for name, candidate in model.named_modules():
        if isinstance(candidate, nn.ModuleList) and (name == path or name.endswith("." + path) or path.endswith(name)):
            return candidate
    raise AssertionError(
        f"no layers at {path}: {[n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]}"
    )


def _skipping(model: nn.Module, path: str, index: int) -> nn.Module:
    """A copy of the model in which one layer hands its input on."""
    model = copy.deepcopy(model)
    layer = _layer_list(model, path)[index]
    original = layer.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(hidden_states, *args, **kwargs)
        return (hidden_states, *result[1:]) if isinstance(result, tuple) else hidden_states

    layer.forward = forward  # type: ignore[method-assign]
    return model


def _drop(program: Program, settings: DropLayers, ctx: Context | None = None, level: int = 1) -> tuple[Program, Any]:
    changed = program.clone()
    context = ctx or Context()
    settings.check(changed, context)
    stats = settings.run(changed, context)
    settings.ensure(program, changed, stats)
    verify(changed, level)
    return changed, stats


def _values(program: Program, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    outputs = program(**inputs)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs.values())


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in LAYERS])
def test_dropped_block_equals_the_eager_model_that_skips_it(name: str) -> None:
    """Bit for bit, at a size that tracing did not see, for every block."""
    model = zoo.get(name)
    inputs = model.inputs(model.unseen_sizes[0] if model.dynamic else model.trace_sizes)
    for index in range(len(_layer_list(module(name), LAYERS[name]))):
        changed, stats = _drop(traced(name), DropLayers(indices=(index,)), level=2 if index == 0 else 1)
        assert stats.hits == 1
        with torch.no_grad():
            expected = flat_outputs(_skipping(module(name), LAYERS[name], index)(**inputs))
        for got, want in zip(_values(changed, inputs), expected, strict=True):
            assert torch.equal(got, want)


@over_zoo(quick=SAMPLE)
def test_every_granularity_over_the_zoo(name: str) -> None:
    """Whatever units are found: the rewritten graph equals the one in which the unit is skipped while running, the
    interface stays, and a dropped unit's own weights are gone."""
    program = traced(name)
    inputs = zoo.get(name).example()
    feeds = program.feeds(**inputs)
    found = 0
    for granularity in ("block", "attention", "mlp"):
        free = [u for u in removable_units(structure(program), granularity) if not u.blocked]
        found += len(free)
        for unit in free[:2]:
            changed, stats = _drop(program, DropLayers(indices=(unit.index,), granularity=granularity))
            assert stats.plan["removed"] == [unit.index]
            expected = program.run(feeds, alias=replacements([unit]))
            assert relative_error(changed.run(changed.feeds(**inputs)), expected) == 0.0
            assert changed.used_weights() == remaining_weights(program, replacements([unit]))
            assert changed.outputs == program.outputs or [s.name for s in changed.outputs] == [
                s.name for s in program.outputs
            ]
    if zoo.get(name).blocks is not None and zoo.get(name).family not in ("cnn",):
        assert found, f"no unit of {name} can be dropped"


def _calibration(name: str, count: int = 2) -> Context:
    model = zoo.get(name)
    return Context(calibration=[model.inputs(size) for size in (*model.unseen_sizes, model.trace_sizes)[:count]])


@pytest.mark.xdist_group("llama")
def test_block_influence_equals_the_hidden_states_of_the_eager_model() -> None:
    """1 - E[cos] over all tokens of all batches, in float64, from the model's own hidden states."""
    ctx = _calibration("llama")
    units = removable_units(structure(traced("llama")), "block")
    scores = block_influence(traced("llama"), units, (), ctx)
    sums, count = torch.zeros(len(units), dtype=torch.float64), 0
    last: dict[int, torch.Tensor] = {}
    layers = _layer_list(module("llama"), LAYERS["llama"])
    hooks = []
    for index, layer in enumerate(layers):

        def record(_: nn.Module, args: Any, output: Any, index: int = index) -> None:
            last[index] = torch.nn.functional.cosine_similarity(
                args[0].double(), (output[0] if isinstance(output, tuple) else output).double(), dim=-1
            )

        hooks.append(layer.register_forward_hook(record))
    for batch in ctx.calibration or ():
        with torch.no_grad():
            module("llama")(**batch)
        count += last[0].numel()
        sums += torch.stack([last[i].sum() for i in range(len(units))])
    for hook in hooks:
        hook.remove()
    for unit in units:
        assert abs(scores[unit.index] - (1 - float(sums[unit.index]) / count)) < 1e-9


@pytest.mark.parametrize("granularity", ["block", "mlp"])
@pytest.mark.xdist_group("llama")
def test_removal_loss_equals_brute_force(granularity: str) -> None:
    """The partial runs that score a unit give what really dropping it gives, also after another one is gone."""
    program, ctx = traced("llama"), _calibration("llama")
    units = removable_units(structure(program), granularity)
    for dropped in ([], [units[1]]):
        left = [u for u in units if u not in dropped]
        scores = removal_loss(program, left, dropped, ctx)
        for unit in left:
            settings = DropLayers(indices=tuple(u.index for u in (*dropped, unit)), granularity=granularity)
            changed, _ = _drop(program, settings)
            distances = [output_distance(changed.run(b), program.run(b)) for b in ctx.calibration or ()]
            assert scores[unit.index] == pytest.approx(sum(distances) / len(distances), rel=1e-6)


@pytest.mark.xdist_group("llama")
def test_greedy_takes_the_best_next_step() -> None:
    """Each removal of the greedy search is the cheapest one given those before it, by brute force."""
    program, ctx = traced("llama"), _calibration("llama")
    count = len(removable_units(structure(program), "mlp"))
    _, stats = _drop(program, DropLayers(ratio=2 / count, granularity="mlp", score="loss", greedy=True), ctx)
    gone: list[int] = []
    for chosen in stats.plan["removed"]:

        def distance(index: int) -> float:
            changed, _ = _drop(program, DropLayers(indices=(*gone, index), granularity="mlp"))
            return sum(output_distance(changed.run(b), program.run(b)) for b in ctx.calibration or ())

        best = min((i for i in range(count) if i not in gone), key=distance)
        assert chosen == best
        gone.append(chosen)
    assert len(gone) == 2


@pytest.mark.xdist_group("llama")
def test_targets_are_met_with_as_few_removals_as_needed() -> None:
    """The parameters left are at most the target, and one removal fewer would leave more."""
    program, ctx = traced("llama"), _calibration("llama")
    one, _ = _drop(program, DropLayers(indices=(0,)))
    per_block = program.parameter_count - one.parameter_count
    target = program.parameter_count - per_block - 1
    changed, stats = _drop(program, DropLayers(target_params=target), ctx)
    assert changed.parameter_count <= target < changed.parameter_count + per_block
    assert len(stats.plan["removed"]) == 2
    in_bytes, _ = _drop(program, DropLayers(target_bytes=4 * target), ctx)
    assert in_bytes.weight_nbytes == 4 * changed.parameter_count


def _mistake(settings: Callable[[], DropLayers], name: str = "llama", calibrated: bool = False) -> str:
    with pytest.raises((PipelineError, PreconditionError)) as caught:
        chosen = settings()
        program = traced(name).clone()
        ctx = _calibration(name) if calibrated else Context()
        chosen.check(program, ctx)
        chosen.run(program, ctx)
    return str(caught.value)


@pytest.mark.xdist_group("llama")
def test_mistakes_say_what_to_do() -> None:
    """Each wrong request is refused with what was found, what is expected, and a remedy."""
    assert "0 to 2" in _mistake(lambda: DropLayers(indices=(7,)))
    assert "calibration" in _mistake(lambda: DropLayers(ratio=0.5))
    assert "one of indices" in _mistake(lambda: DropLayers())
    assert "one of indices" in _mistake(lambda: DropLayers(indices=(1,), ratio=0.5))
    assert "less than 1" in _mistake(lambda: DropLayers(ratio=1.0))
    assert "block-influence" in _mistake(lambda: DropLayers(ratio=0.5, score="block-influense"))
    assert "out of reach" in _mistake(lambda: DropLayers(target_params=1), calibrated=True)


@pytest.mark.xdist_group("plain_lstm")
def test_a_model_without_residual_stream_is_refused() -> None:
    """No silent no-op."""
    assert "residual stream" in _mistake(lambda: DropLayers(indices=(0,)), "plain_lstm")


@pytest.mark.parametrize("score", ["block-influence", "loss"])
def test_scores_that_are_not_numbers_choose_nothing(score: str) -> None:
    case = DropLayers.planted()
    program = case.program.clone()
    name = next(n for n in sorted(program.used_weights()) if program.weights[n].dtype.is_floating_point)
    program.weights[name] = Weight.from_tensor(torch.full(program.weights[name].shape, torch.nan))
    with pytest.raises(PreconditionError, match="is not a number"):
        _drop(program, DropLayers(ratio=0.25, score=score), Context(calibration=case.calibration))


def test_a_removal_that_breaks_the_model_is_the_worst() -> None:
    """Block 0 keeps the stream positive, so that the square root at the end is a number."""

    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.a, self.b = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 9 * torch.sigmoid(self.lift(x))
            x = x + torch.sigmoid(self.a(x))
            x = x + torch.sigmoid(self.b(x))
            return torch.sqrt(x)

    torch.manual_seed(0)
    example = -torch.ones(1, 3, 4)
    program = trace(Rooted(), (example,))
    units = removable_units(structure(program), "block")
    scores = removal_loss(program, units, (), Context(calibration=[{"x": example}]))
    assert scores[0] == torch.inf and all(scores[i] < torch.inf for i in scores if i)


@pytest.mark.parametrize("score", [block_influence, removal_loss])
def test_hidden_tokens_have_no_say(score: Any) -> None:
    inputs = zoo.get("llama").example()
    mask = torch.ones_like(inputs["input_ids"])
    program = trace(module("llama"), {**inputs, "attention_mask": mask})
    units = removable_units(structure(program), "block")
    mask[:, -3:] = 0
    other = torch.where(mask != 0, inputs["input_ids"], (inputs["input_ids"] + 1) % 7)
    scores = [
        score(program, units, (), Context(calibration=[{"input_ids": ids, "attention_mask": mask}]))
        for ids in (inputs["input_ids"], other)
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    unmasked = score(program, units, (), Context(calibration=[{"input_ids": other, "attention_mask": mask * 0 + 1}]))
    assert unmasked != pytest.approx(scores[0], rel=1e-3)


def test_a_target_that_is_met_needs_no_data() -> None:
    _, stats = _drop(traced("llama"), DropLayers(target_params=10**12))
    assert stats.hits == 0 and "they fit the target" in stats.notes[0]


def test_a_stream_without_a_batch_dimension_is_scored() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + torch.relu(layer(x))
            return x

    torch.manual_seed(0)
    model, x = Flat(), torch.randn(5)
    program = trace(model, (x,))
    units = removable_units(structure(program), "block")
    scores = block_influence(program, units, (), Context(calibration=[{"x": x}]))
    with torch.no_grad():
        after = x + torch.relu(model.layers[0](x))
    assert scores[0] == pytest.approx(1 - float(torch.cosine_similarity(x, after, dim=0)), rel=1e-5)
