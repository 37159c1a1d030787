"""Channel scores against loops, refits and the eager model, in float64; planted channels; refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphlathe.ir.errors import PreconditionError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.ir.weights import Weight
from graphlathe.passes.base import Context
from graphlathe.passes.fidelity import output_distance
from graphlathe.passes.search.scores import CHANNEL_SCORES, compensated, register_relevance
from graphlathe.passes.search.scores.base import ChannelScore
from graphlathe.passes.search.sites import KINDS, ChannelSite, channel_sites
from graphlathe.passes.search.statistics import collect_in_chunks
from graphlathe.tools import zoo
from tests.zoo_files import from_our_file
from tests.zoo_programs import module, traced

Rows = np.ndarray[Any, Any]
MEASURED = ("wanda", "fluctuation", "activation", "usage", "optimal-compensation", "condition")
"""Scores that depend on the rows and the matrix of one consumer alone."""


def sites_of(program: Program, kind: str) -> list[ChannelSite]:
    return channel_sites(program, structure(program), [kind])[0]


def reference(name: str, rows: Rows, matrix: Rows, atoms: Sequence[Sequence[int]]) -> list[float]:
    """A score of one consumer from its definition, element by element.

    Args:
        name: the score.
        rows: [n, columns].
        matrix: [out, columns].
        atoms: the columns of each atom.
    """
    n, outs = len(rows), range(len(matrix))
    if name == "wanda":
        norms = [np.sqrt(sum(x * x for x in rows[:, j]) / n) for j in range(rows.shape[1])]
        return [sum(abs(matrix[i, j]) * norms[j] for j in atom for i in outs) for atom in atoms]
    if name == "fluctuation":
        return [sum(variance(rows[:, j]) * sum(matrix[i, j] ** 2 for i in outs) for j in atom) for atom in atoms]
    if name == "activation":
        return [np.sqrt(sum((sum(abs(x) for x in rows[:, j]) / n) ** 2 for j in atom)) for atom in atoms]
    if name == "usage":
        wins = [0] * len(atoms)
        for x in rows:
            added = [np.linalg.norm(sum(x[j] * matrix[:, j] for j in atom)) for atom in atoms]
            wins[int(np.argmax(added))] += max(added) > 0
        return [count / n for count in wins]
    # Damping is the same as further rows: a little of every channel alone.
    damping = compensated.DAMPING * sum((rows[:, j] ** 2).mean() for j in range(rows.shape[1])) / rows.shape[1]
    longer = np.concatenate([rows / np.sqrt(n), np.sqrt(damping) * np.eye(rows.shape[1])])
    if name == "optimal-compensation":
        return [refit_error(longer, longer @ matrix.T, atom) for atom in atoms]
    assert name == "condition"
    return [
        float(np.mean([refit_error(longer, longer[:, [j]], [j]) / (longer[:, j] ** 2).sum() for j in atom]))
        for atom in atoms
    ]


def variance(values: Rows) -> float:
    """FLAP's recursion, one row at a time: the mean moves, and the spread grows by both deviations' product."""
    mean, spread = 0.0, 0.0
    for count, value in enumerate(values, 1):
        before = mean
        mean = mean * (count - 1) / count + value / count
        spread = spread * (count - 1) / count + (value - mean) * (value - before) / count
    return spread


def refit_error(rows: Rows, target: Rows, removed: Sequence[int]) -> float:
    """What is left of the target when only the other columns may be used, and are used as well as can be."""
    kept = [j for j in range(rows.shape[1]) if j not in set(removed)]
    fit = np.linalg.lstsq(rows[:, kept], target, rcond=None)[0]
    return float(((target - rows[:, kept] @ fit) ** 2).sum())


class Mlp(nn.Module):
    """A residual MLP, so that its hidden channels are of kind ``mlp``; ten outputs, so that they look like logits."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(5, hidden), nn.Linear(hidden, 5), nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        """One block and a head."""
        return self.head(x + self.down(torch.relu(self.up(x))))


def mlp(seed: int = 0) -> tuple[Mlp, Program, list[dict[str, Tensor]]]:
    torch.manual_seed(seed)
    model = Mlp().double()
    data = [{"x": torch.randn(n, 7, 5, dtype=torch.float64)} for n in (2, 2, 2)]
    return model, trace(model, (data[0]["x"],)), data


def hidden(model: Mlp, data: list[dict[str, Tensor]]) -> Rows:
    return torch.cat([torch.relu(model.up(b["x"])).reshape(-1, 6) for b in data]).detach().numpy()


def score(name: str, program: Program, sites: Sequence[ChannelSite], data: Any) -> list[Rows]:
    """The scores of each site, in order."""
    found = CHANNEL_SCORES[name](program, sites, Context(calibration=data))
    assert found.keys() == {site.index for site in sites}
    for site in sites:
        assert found[site.index].dtype == np.float64 and found[site.index].shape == (site.size,)
    return [found[site.index] for site in sites]


@pytest.mark.parametrize("name", MEASURED)
def test_mlp(name: str) -> None:
    model, program, data = mlp()
    (site,) = sites_of(program, "mlp")
    expected = reference(name, hidden(model, data), model.down.weight.detach().numpy(), [[j] for j in range(6)])
    np.testing.assert_allclose(score(name, program, [site], data)[0], expected, rtol=1e-9, atol=1e-12)


def test_magnitude_counts_every_element_once() -> None:
    model, program, _ = mlp()
    (site,) = sites_of(program, "mlp")
    expected = [
        np.sqrt(
            sum(v**2 for v in model.up.weight[j].tolist()) + model.up.bias[j].detach().item() ** 2
            + sum(v**2 for v in model.down.weight[:, j].tolist())
        )
        for j in range(6)
    ]  # fmt: skip
    np.testing.assert_allclose(score("magnitude", program, [site], None)[0], expected, rtol=1e-12)


def test_magnitude_of_a_weight_with_atoms_along_two_dimensions() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.conv = nn.Linear(4, 4, bias=False), nn.Conv1d(4, 4, 3, padding=1, bias=False)
            self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = h + self.w(h)
            return self.last(h + self.conv(h.transpose(1, 2)).transpose(1, 2))

    model = Square().double()
    program = trace(model, (torch.randn(2, 5, 3, dtype=torch.float64),))
    (site,) = [s for kind in KINDS for s in sites_of(program, kind) if s.size == 4]
    values = score("magnitude", program, [site], None)[0]
    for atom in range(4):
        total = (model.first.weight[atom].square().sum() + model.last.weight[:, atom].square().sum()).detach().item()
        for weight in (model.w.weight, model.conv.weight):
            total += sum(
                weight[i, j].detach().square().sum().item() for i in range(4) for j in range(4) if atom in (i, j)
            )
        assert values[atom] == pytest.approx(np.sqrt(total), rel=1e-12)


def own_choice(logits: Tensor) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    return -sum(torch.log_softmax(row, 0)[int(row.argmax())] for row in flat) / len(flat)


def test_gradient_of_logits() -> None:
    model, program, data = mlp()
    (site,) = sites_of(program, "mlp")
    expected = np.zeros(6)
    for batch in data:
        model.zero_grad()
        own_choice(model(batch["x"])).backward()
        for j in range(6):
            parts = ((model.up.weight, j), (model.up.bias, j), (model.down.weight, (slice(None), j)))
            expected[j] += abs(sum(float((w.detach()[at] * w.grad[at]).sum()) for w, at in parts)) / len(data)  # type: ignore[index]
    np.testing.assert_allclose(score("gradient", program, [site], data)[0], expected, rtol=1e-9)


def test_gradient_of_other_outputs() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    program = trace(model, (x,))
    (site,) = sites_of(program, "channels")
    (model(x).square().mean() / 2).backward()
    first, last = model[0], model[2]
    terms = (
        (first.weight * first.weight.grad).sum(1)
        + first.bias * first.bias.grad
        + (last.weight * last.weight.grad).sum(0)
    )
    np.testing.assert_allclose(score("gradient", program, [site], [{"input": x}])[0], terms.detach().abs(), rtol=1e-9)


def test_gradient_leaves_out_hidden_positions() -> None:
    class Masked(Mlp):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * attention_mask[..., None].clamp(min=1)

    torch.manual_seed(0)
    model = Masked().double()
    x, mask = torch.randn(2, 5, 5, dtype=torch.float64), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    program = trace(model, (x, mask))
    (site,) = sites_of(program, "mlp")
    other = torch.where(mask[..., None] != 0, x, x + 3)
    a, b = (score("gradient", program, [site], [{"x": v, "attention_mask": mask}])[0] for v in (x, other))
    np.testing.assert_allclose(a, b, rtol=1e-12)
    c = score("gradient", program, [site], [{"x": other, "attention_mask": mask * 0 + 1}])[0]
    assert not np.allclose(a, c, rtol=1e-3)


def test_removal() -> None:
    """Against the eager model with the channel's readers zeroed."""
    model, program, data = mlp()
    (site,) = sites_of(program, "mlp")
    expected = []
    for j in range(6):
        smaller = copy.deepcopy(model)
        smaller.down.weight.data[:, j] = 0
        with torch.no_grad():
            pairs = [({"output": smaller(b["x"])}, {"output": model(b["x"])}, b) for b in data]
        expected.append(float(np.mean([output_distance(*pair) for pair in pairs])))
    np.testing.assert_allclose(score("removal", program, [site], data)[0], expected, rtol=1e-9, atol=1e-15)


def test_removal_where_zeroing_is_not_cutting() -> None:
    """A norm counts its channels: the eager reference takes the mean square over those that stay."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(3, 4), nn.RMSNorm(4, eps=1e-6), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.norm(self.up(x)))

    torch.manual_seed(0)
    model = Normed().double()
    x = torch.randn(6, 3, dtype=torch.float64)
    program = trace(model, (x,))
    (site,) = [s for kind in KINDS for s in sites_of(program, kind)]
    assert not site.group.zeroable
    found = score("removal", program, [site], [{"x": x}])[0]
    with torch.no_grad():
        whole = model(x)
        for j in range(4):
            kept = [i for i in range(4) if i != j]
            h = model.up(x)[:, kept]
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * model.norm.weight[kept]
            smaller = h @ model.down.weight[:, kept].T + model.down.bias
            distance = output_distance({"y": smaller}, {"y": whole})
            assert found[j] == pytest.approx(distance, rel=1e-9)


@cache
def double(name: str) -> tuple[nn.Module, Program, list[dict[str, Any]]]:
    model = copy.deepcopy(module(name)).double()
    batches: list[dict[str, Any]] = []
    for seed in range(2):
        torch.manual_seed(seed)
        example = {k: v for k, v in zoo.get(name).example().items() if k != "attention_mask"}
        batches.append(
            {
                k: torch.randn(v.shape, dtype=torch.float64) if v.is_floating_point() else torch.randint_like(v, 2, 60)
                for k, v in example.items()
            }
        )
    return model, trace(model, batches[0]), batches


def inputs_of(model: nn.Module, path: str, data: list[dict[str, Any]]) -> Tensor:
    """What the module at ``path`` was called with, over all batches."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda m, args, y: found.append(args[0].detach()))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    hook.remove()
    return torch.cat(found)


@pytest.mark.xdist_group("llama")
@pytest.mark.parametrize("name", [*MEASURED, "gradient"])
def test_key_and_value_groups_of_llama(name: str) -> None:
    """A head of keys and values goes with the query heads that share it: neighbouring output channels."""
    model, program, data = double("llama")
    sites = sites_of(program, "heads")
    found = score(name, program, sites, data)
    layers = model.model.layers  # type: ignore[union-attr]
    assert [s.size for s in sites] == [2] * len(layers)
    atoms = [list(range(16)), list(range(16, 32))]
    if name == "gradient":
        expected = np.zeros((len(layers), 2))
        for batch in data:
            model.zero_grad()
            own_choice(model(**batch).logits).backward()
            for at, layer in enumerate(layers):
                attention = layer.self_attn
                for a in range(2):
                    total = sum(
                        float((w.detach() * w.grad).reshape(2, -1)[a].sum())
                        for w in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
                    )
                    o = attention.o_proj.weight
                    expected[at, a] += abs(total + float((o.detach() * o.grad)[:, atoms[a]].sum())) / len(data)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        return
    for at in range(len(layers)):
        rows = inputs_of(model, f"model.layers.{at}.self_attn.o_proj", data).reshape(-1, 32).numpy()
        matrix = layers[at].self_attn.o_proj.weight.detach().numpy()
        np.testing.assert_allclose(found[at], reference(name, rows, matrix, atoms), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", MEASURED)
def test_convolutions(name: str) -> None:
    """Convolution, norm, activation, convolution: a channel is nine columns of its reader."""
    model, program, data = double("plain_resnet")
    (site,) = [s for s in sites_of(program, "channels") if s.consumers[0].weight == "body.0.branch.2.0.weight"]
    image = inputs_of(model, "body.0.branch.2.0", data)
    rows = nn.functional.unfold(image, 3, padding=1).transpose(1, 2).reshape(-1, 9 * image.shape[1]).numpy()
    weight = model.get_submodule("body.0.branch.2.0").weight.detach()
    matrix, atoms = weight.flatten(1).numpy(), [list(range(9 * a, 9 * a + 9)) for a in range(len(weight))]
    np.testing.assert_allclose(
        score(name, program, [site], data)[0], reference(name, rows, matrix, atoms), rtol=1e-7, atol=1e-12
    )


SAME = [n for n in CHANNEL_SCORES if n != "relevance"]


@pytest.mark.parametrize(("model", "kinds"), [("llama", ("heads", "mlp")), ("plain_resnet", ("channels",))])
def test_an_imported_file_scores_the_same(model: str, kinds: tuple[str, ...]) -> None:
    """The names and the operators differ, the sites and their scores do not."""
    results: list[dict[str, list[Rows]]] = []
    for program in (traced(model), from_our_file(model)):
        batch = dict(zip(program.main.inputs, zoo.get(model).example().values(), strict=True))
        sites = [sites_of(program, kind)[0] for kind in kinds]
        results.append({name: score(name, program, sites, [batch]) for name in SAME if name != "removal"})
        results[-1]["removal"] = score("removal", program, sites[:1], [batch])
    for name, found in results[0].items():
        for ours, theirs in zip(found, results[1][name], strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=2e-3, atol=1e-6, err_msg=name)


def planted(change: Callable[[Mlp], None]) -> tuple[Program, list[ChannelSite], list[dict[str, Tensor]]]:
    torch.manual_seed(3)
    model = Mlp().double()
    change(model)
    data = [{"x": torch.randn(4, 9, 5, dtype=torch.float64)} for _ in range(3)]
    program = trace(model, (data[0]["x"],))
    return program, sites_of(program, "mlp"), data


def test_a_constant_channel_does_not_fluctuate() -> None:
    def change(model: Mlp) -> None:
        model.up.weight.data[2], model.up.bias.data[2] = 0.0, 7.3

    program, sites, data = planted(change)
    values = score("fluctuation", program, sites, data)[0]
    assert values[2] == 0.0 and (np.delete(values, 2) > 0).all()
    assert np.argmax(score("activation", program, sites, data)[0]) == 2


def test_a_duplicated_channel_is_redundant() -> None:
    def change(model: Mlp) -> None:
        model.up.weight.data[4], model.up.bias.data[4] = model.up.weight.data[1], model.up.bias.data[1]
        model.up.bias.data += 1

    program, sites, data = planted(change)
    for name in ("condition", "optimal-compensation"):
        values = score(name, program, sites, data)[0]
        assert set(np.argsort(values)[:2]) == {1, 4}, (name, values)


def test_a_dead_channel_matters_least() -> None:
    def change(model: Mlp) -> None:
        model.up.weight.data[3], model.up.bias.data[3] = 0.0, -1.0

    program, sites, data = planted(change)
    for name in SAME:
        values = score(name, program, sites, data)[0]
        # Damping makes every weight cost a little, and what is standardised has no zero.
        if name in ("optimal-compensation", "standard-fluctuation"):
            assert np.argmin(values) == 3
        elif name != "magnitude":
            assert values[3] == pytest.approx(0.0, abs=1e-15) and (np.delete(values, 3) > 0).all(), (name, values)


@pytest.mark.xdist_group("llama")
def test_a_dead_head_is_never_used() -> None:
    program, data = traced("llama").clone(), [zoo.get("llama").example()]
    sites = sites_of(program, "heads")
    name = "model.layers.1.self_attn.v_proj.weight"
    value = program.weights[name].tensor().clone()
    value[:8] = 0
    program.weights[name] = Weight.from_tensor(value)
    found = score("usage", program, sites, data)
    assert found[1].tolist() == [0.0, 1.0]
    assert 0 < found[0][0] < 1 and found[0].sum() == pytest.approx(1)


def test_equals_share_what_they_win() -> None:
    def change(model: Mlp) -> None:
        for layer in (model.up.weight.data, model.up.bias.data, model.down.weight.data.T):
            layer[1:] = layer[:1]

    program, sites, data = planted(change)
    values = score("usage", program, sites, data)[0]
    assert np.ptp(values) < 1e-12 and 0 < values.sum() <= 1


def test_grams_in_several_passes_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    program, data = traced("plain_resnet"), [zoo.get("plain_resnet").example()]
    sites = sites_of(program, "channels")
    whole = score("optimal-compensation", program, sites, data)
    monkeypatch.setattr(compensated, "GRAM_BYTES", 1)
    consumers = [c for s in sites for c in s.consumers]
    assert len(list(collect_in_chunks(program, consumers, Context(calibration=data), limit_bytes=1))) > 1
    for values, same in zip(score("optimal-compensation", program, sites, data), whole, strict=True):
        np.testing.assert_array_equal(values, same)


def test_relevance_comes_from_its_provider() -> None:
    _, program, data = mlp()
    sites = sites_of(program, "mlp")
    with pytest.raises(PreconditionError, match="not installed"):
        score("relevance", program, sites, data)
    register_relevance(lambda program, sites, ctx: {site.index: np.arange(6.0) for site in sites})
    try:
        assert score("relevance", program, sites, data)[0].tolist() == [0, 1, 2, 3, 4, 5]
    finally:
        register_relevance(None)


@pytest.mark.parametrize("name", [n for n, s in CHANNEL_SCORES.items() if s.calibration])
def test_data_is_needed(name: str) -> None:
    _, program, _ = mlp()
    with pytest.raises(PreconditionError, match="no calibration data"):
        score(name, program, sites_of(program, "mlp"), None)


@pytest.mark.xdist_group("mixtral")
def test_readers_that_cannot_be_read_are_named() -> None:
    program, data = traced("mixtral"), [zoo.get("mixtral").example()]
    site = next(s for s in sites_of(program, "channels") if s.unread)
    needing = [n for n, s in CHANNEL_SCORES.items() if s.consumers]
    assert len(needing) == 7
    for name in needing:
        with pytest.raises(PreconditionError, match=r"%grouped_mm\w* .*raise-experts"):
            score(name, program, [site], data)


def test_a_site_that_is_given_twice_is_refused() -> None:
    _, program, data = mlp()
    (site,) = sites_of(program, "mlp")
    with pytest.raises(PreconditionError, match="the same index"):
        score("magnitude", program, [site, site], data)


def test_numbers_that_are_none_are_refused() -> None:
    _, program, data = mlp()
    broken: ChannelScore = replace(
        CHANNEL_SCORES["magnitude"], function=lambda p, sites, c: {s.index: np.full(s.size, np.nan) for s in sites}
    )
    with pytest.raises(PreconditionError, match=r"'magnitude' of mlp .* is not a number"):
        broken(program, sites_of(program, "mlp"), Context(calibration=data))


@torch.library.custom_op("graphlathe_tests::halve", mutates_args=())
def halve(x: Tensor) -> Tensor:
    """An operator without a gradient."""
    return x / 2


@halve.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Odd(nn.Module):
    """An MLP through an operator of choice."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.up, self.down = function, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The operator works on the output."""
        return self.function(self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (halve, "'graphlathe_tests.halve' has no gradient"),
        (lambda y: (y > 0).to(torch.int64), "no output depends on"),
    ],
)
def test_operators_without_a_gradient_are_named(function: Any, reason: str) -> None:
    x = torch.randn(5, 3)
    program = trace(Odd(function), (x,))
    with pytest.raises(PreconditionError, match=reason):
        score("gradient", program, sites_of(program, "channels"), [{"x": x}])
