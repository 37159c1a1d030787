"""Pictures: files appear, and what is in them is what is in the plan."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphlathe.ir.errors import ExportError, GraphlatheError, InputError
from graphlathe.passes.base import Pass
from graphlathe.passes.layers.evopress import EvoPress
from graphlathe.passes.weights.rocket import Rocket
from graphlathe.tools.plot_data import Point
from graphlathe.tools.plot_search import front_of
from graphlathe.tools.plots import plan_figures, plan_figures_png, plan_figures_svg, plot_plan
from tests.passes.channels import tiny


def site(kind: str, block: int | None, units: int, removed: list[int], **more: Any) -> dict[str, Any]:
    scores = [0.1 + (7 * u + (block or 0)) % 11 for u in range(units)]
    base = {"label": f"{kind} {block}", "kind": kind, "block": block, "units": units, "removed": removed}
    return {**base, "scores": scores, "level": "some", **more}


def plan(layers: int = 4, heads: int = 3, neurons: int = 130) -> dict[str, Any]:
    sites = [site("heads", b, heads, [b % heads]) for b in range(layers)]
    sites += [site("neurons", b, neurons, list(range(b * 10 % neurons))) for b in range(layers)]
    sites += [site("attention", b, 1, [0] if b == 1 else []) for b in range(layers)]
    sites += [site("mlp", b, 1, []) for b in range(layers)]
    evaluated = [
        {"cost": 90e6, "score": 0.5, "origin": "seed: uniform"},
        {"cost": 80e6, "score": 0.7, "origin": "seed: loss"},
        {"cost": 85e6, "score": 0.9, "origin": "mutation"},
        {"cost": 70e6, "score": 2.0, "origin": "mutation"},
        {"cost": 75e6, "score": None, "origin": "mutation"},
    ]
    history = [{"generation": g, "evaluations": 8 * g + 8, "best": 1 / (g + 1), "cost": 80e6} for g in range(5)]
    budget, chosen = {"kind": "params", "limit": 82e6}, {"cost": 80e6, "score": 0.7}
    return {
        "sites": sites,
        "search": {"history": history, "evaluated": evaluated, "chosen": chosen, "budget": budget},
    }


NAMES = ["keep-ratios", "scores", "scores-heads", "scores-neurons", "search-front", "search-progress"]


def cells(figure: Any) -> Any:
    """The numbers of a heat map, [rows, columns]."""
    (image,) = figure.axes[0].images
    return image.get_array()


def crosses(figure: Any) -> set[tuple[int, int]]:
    found = {(int(x), int(y)) for c in figure.axes[0].collections for x, y in c.get_offsets()}
    return found


def test_files_appear(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pictures"
    paths = plot_plan(plan(), folder)
    assert [path.name for path in paths] == [f"{name}.png" for name in NAMES]
    assert sorted(folder.iterdir()) == sorted(paths)
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n")
        assert len(content) > 5000


def test_names_of_kinds_cannot_leave_the_folder(tmp_path: Path) -> None:
    paths = plot_plan({"sites": [site("../up/Heads (grouped)", 0, 3, [])]}, tmp_path)
    assert [p.name for p in paths] == ["keep-ratios.png", "scores-up-heads-grouped.png"]


def test_the_same_pictures_as_bytes(tmp_path: Path) -> None:
    small = {"sites": plan(2)["sites"][:2]}
    paths = plot_plan(small, tmp_path)
    assert plan_figures_png(small) == {path.stem: path.read_bytes() for path in paths}


def test_svg_is_well_formed_and_the_same_each_time() -> None:
    small = {"sites": plan(2)["sites"][:2], "search": None}
    pictures = plan_figures_svg(small)
    assert list(pictures) == ["keep-ratios", "scores-heads"]
    assert pictures == plan_figures_svg(small)
    for text in pictures.values():
        assert ET.fromstring(text).tag.endswith("svg")


@pytest.mark.parametrize("layers", [1, 2, 30, 200])
def test_a_bar_and_a_cell_for_each_site(layers: int) -> None:
    data = plan(layers)
    figures = plan_figures(data)
    bars = [c for axes in figures["keep-ratios"].axes for c in axes.containers if c.get_label() == "kept"]
    assert [len(c) for c in bars] == [layers] * 4
    heights = [bar.get_height() for c in bars for bar in c]
    assert heights == pytest.approx([100 * (1 - len(s["removed"]) / s["units"]) for s in data["sites"]])
    assert cells(figures["scores"]).shape == (2, layers)
    assert cells(figures["scores-heads"]).shape == (3, layers)
    assert cells(figures["scores-neurons"]).shape == (100, layers)


def test_cells_hold_the_scores_and_removed_units_are_marked() -> None:
    data = plan(5)
    figures = plan_figures(data)
    heads = [s for s in data["sites"] if s["kind"] == "heads"]
    assert cells(figures["scores-heads"]).T.tolist() == [s["scores"] for s in heads]
    assert crosses(figures["scores-heads"]) == {(b, u) for b, s in enumerate(heads) for u in s["removed"]}
    assert crosses(figures["scores"]) == {(1, 0)}
    assert figures["scores"].axes[0].get_title(loc="left") == "Score of each site; × removed (1 of 10)"


def test_many_units_are_sorted_and_the_removed_share_is_drawn() -> None:
    data = plan(5)
    axes = plan_figures(data)["scores-neurons"].axes[0]
    shown = axes.images[0].get_array().T.tolist()
    neurons = [s for s in data["sites"] if s["kind"] == "neurons"]
    for column, one in zip(shown, neurons, strict=True):
        assert column == sorted(column)
        assert column[50] == sorted(one["scores"])[65]
    line = axes.patches[0].get_data()
    assert list(line.values + 0.5) == pytest.approx([100 * len(s["removed"]) / 130 for s in neurons])


def test_sites_of_different_sizes_and_without_scores() -> None:
    sites = [site("c", None, 4, [1]), site("c", None, 2, []), site("c", None, 4, [0], scores=None)]
    sites.append(site("c", None, 2, [], scores=[None, 1.0]))
    figure = plan_figures({"sites": sites})["scores-c"]
    known = ~cells(figure).mask
    assert known.T.tolist() == [[True] * 4, [True, True, False, False], [False] * 4, [False, True, False, False]]
    assert crosses(figure) == {(0, 1), (2, 0)}
    assert figure.axes[0].get_title(loc="left").endswith("gray: no finite score")
    (covered,) = figure.axes[0].containers
    assert [(b.get_x() + 0.5, b.get_y(), b.get_height()) for b in covered] == [(1.0, 1.5, 2.0), (3.0, 1.5, 2.0)]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["c None"] * 4


def test_without_scores_there_is_no_map() -> None:
    assert list(plan_figures({"sites": [site("c", 0, 4, [1], scores=None)]})) == ["keep-ratios"]


def test_a_site_that_goes_altogether_is_counted() -> None:
    axes = plan_figures({"sites": [site("c", 0, 2, [0, 1]), site("c", 1, 2, [])]})["keep-ratios"].axes[0]
    assert axes.get_title(loc="left") == "c: 2 of 4 units stay (50 %); 1 of 2 gone altogether (×)"


def linear(level: str) -> dict[str, Any]:
    return site("linear", 0, 1, [], scores=None, level=level)


def heights(figure: Any) -> list[float]:
    (bars,) = (c for c in figure.axes[0].containers if c.get_label() == "kept")
    return [bar.get_height() for bar in bars]


@pytest.mark.parametrize(
    ("level", "share"),
    [
        ("", 1.0),
        ("nonzeros=512 method=sparsegpt shape=64x32", 512 / (64 * 32)),
        ("nonzeros=0 method=magnitude shape=64x32", 0.0),
        ("bits=4 group=64 method=gptq shape=64x64 was=32", 4 / 32),
        ("bits=3 method=gptq shape=64x64 was=16", 3 / 16),
        ("nonzeros=512 method=wanda correction=4 shape=64x32", (512 + 4 * (64 + 32)) / (64 * 32)),
        ("bits=4 method=gptq correction=8 shape=64x64 was=32", 4 / 32 + 8 * 128 / 64**2),
        ("rank=8 shape=64x32", 8 * (64 + 32) / (64 * 32)),
        ("rank=8 nonzeros=4 shape=64x32", (8 * 32 + 4 * 64) / (64 * 32)),
        ("rank=32 shape=64x32", 1.5),
    ],
)
def test_a_stored_weight_keeps_what_its_level_leaves(level: str, share: float) -> None:
    figure = plan_figures({"sites": [linear(level), linear("")]})["keep-ratios"]
    assert heights(figure) == pytest.approx([100 * share, 100.0])
    if level:
        assert f"linear: {50 * (share + 1):.0f} % stays on average" in figure.axes[0].get_title(loc="left")
    assert figure.axes[0].get_ylim()[1] == max(100, 100 * share)


@pytest.mark.parametrize("level", ["bits=4 shape=64x64", "bits=4 was=32", "nonzeros=5", "rank=3"])
def test_what_a_plan_does_not_say_is_not_drawn(level: str) -> None:
    """By hand: such a plan can be applied."""
    figure = plan_figures({"sites": [linear(level), linear("")]})["keep-ratios"]
    axes = figure.axes[0]
    assert [[bar.get_height() for bar in bars] for bars in axes.containers] == [[0.0, 100.0]] * 2
    assert axes.get_title(loc="left") == "linear: 100 % stays on average; 1 of 2 do not say how much"
    assert plan_figures_png({"sites": [linear(level)]})


@pytest.mark.parametrize(
    "settings",
    [
        EvoPress(mode="sparsity", ratio=0.4, levels=4, generations=1, offspring=2),
        EvoPress(mode="bits", bits=(8, 4), ratio=0.6, generations=1, offspring=2),
        EvoPress(mode="sparsity", ratio=0.3, levels=4, rank=1, generations=1, offspring=2),
        Rocket(ratio=0.3),
    ],
    ids=["sparsity", "bits", "sparsity with maps", "rank"],
)
def test_bars_of_linear_layers_are_what_the_program_stores(settings: Pass) -> None:
    blocks = [tiny.Attention(4, 4), tiny.Mlp(8), tiny.Attention(4, 4), tiny.Mlp(8)]
    program = tiny.program_of(tiny.stack(*blocks))
    after, stats = tiny.run(program, settings, tiny.data())
    names = [f"blocks.{b}.{layer}.weight" for b in range(4) for layer in (("up", "down") if b % 2 else "qkvo")]
    expected: list[float] = []
    for name in names:
        held = {n.removeprefix(name): after.weights[n].tensor() for n in after.used_weights() if n.startswith(name)}
        if ".codes" in held:
            expected.append(8 * held[".codes"].numel() / (64 * program.weights[name].numel))
        else:
            expected.append(sum(int(value.count_nonzero()) for value in held.values()) / program.weights[name].numel)
    assert min(expected) < 1
    assert heights(plan_figures(stats.plan)["keep-ratios"]) == pytest.approx([100 * share for share in expected])


@pytest.mark.parametrize("scores", [[1.0, 1.0], [0.0, 0.0], [math.inf, math.inf], [-1.0, 1e9], [1e-9, 1e9]])
def test_scores_of_any_size(scores: list[float]) -> None:
    assert plan_figures_png({"sites": [site("c", 0, 2, [1], scores=scores)]})["scores-c"]


def test_a_few_extreme_scores_do_not_take_up_the_scale() -> None:
    scores = [1.0 + u % 5 for u in range(60)]
    sites = [site("c", b, 60, [], scores=scores) for b in range(4)]
    sites[0]["scores"] = [1e9, *scores[1:]]
    norm = plan_figures({"sites": sites})["scores-c"].axes[0].images[0].norm
    assert (norm.vmin, norm.vmax) == (1.0, 5.0)


def test_the_front() -> None:
    figure = plan_figures(plan())["search-front"]
    (axes,) = figure.axes
    handles, labels = axes.get_legend_handles_labels()
    drawn = dict(zip(labels, handles, strict=True))
    assert drawn.keys() == {
        "evaluated (2)",
        "Pareto front",
        "seed: uniform",
        "seed: loss",
        "chosen",
        "budget: 82M parameters",
    }
    assert drawn["Pareto front"].get_xydata().tolist() == [[70e6, 2.0], [80e6, 0.7], [90e6, 0.5], [90e6, 0.5]]
    assert drawn["chosen"].get_offsets().tolist() == [[80e6, 0.7]]
    assert drawn["seed: loss"].get_offsets().tolist() == [[80e6, 0.7]]
    assert axes.get_title(loc="left") == "5 candidates by cost and score; 1 without a finite score left out"
    assert axes.get_xlabel() == "cost (parameters)"


def test_a_front_of_one_point_goes_on_to_the_dearest_candidate() -> None:
    data = plan()
    for number, point in enumerate(data["search"]["evaluated"]):
        point |= {"cost": 70e6 + number * 1e6, "score": 1.0 + number}
    handles, labels = plan_figures(data)["search-front"].axes[0].get_legend_handles_labels()
    line = dict(zip(labels, handles, strict=True))["Pareto front"]
    assert line.get_xydata().tolist()[0] == [70e6, 1.0] and line.get_xydata().tolist()[-1][0] > 70e6


def test_labels_of_a_low_color_bar_do_not_touch() -> None:
    """One row of scores over orders of magnitude: the labels of the ends, and no others."""
    data = {"sites": [site("drop-block", b, 1, [], scores=[10.0**-b]) for b in range(4)]}
    bar = plan_figures(data)["scores"].axes[1]
    assert [t.get_text() for t in bar.get_yticklabels()] == ["0.001", "1"] and not len(bar.get_yticks(minor=True))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_the_front_is_what_nothing_beats(pairs: list[tuple[int, int]]) -> None:
    points = [Point(*map(float, pair)) for pair in pairs]
    expected = {
        (p.cost, p.score)
        for p in points
        if not any(q.cost <= p.cost and q.score <= p.score and (q.cost, q.score) != (p.cost, p.score) for q in points)
    }
    front = [(p.cost, p.score) for p in front_of([*points, Point(-1.0, math.nan)])]
    assert set(front) == expected
    assert front == sorted(front)
    assert len(front) == len(expected)


def test_the_progress() -> None:
    upper, lower = plan_figures(plan())["search-progress"].axes
    assert upper.lines[0].get_xydata().tolist() == [[8.0 * g + 8, 1 / (g + 1)] for g in range(5)]
    assert lower.lines[0].get_ydata().tolist() == [80e6] * 5
    assert lower.lines[1].get_ydata() == [82e6, 82e6]
    assert upper.get_title(loc="left") == "Best of 40 evaluations in 4 generations: 0.2"


@pytest.mark.parametrize(("kind", "text"), [("ms", "12.3 ms"), ("bytes", "12.3 bytes"), ("macs", "multiply")])
def test_units_of_the_budget(kind: str, text: str) -> None:
    data = plan()
    data["search"]["budget"] = {"kind": kind, "limit": 12.3}
    labels = plan_figures(data)["search-front"].axes[0].get_legend_handles_labels()[1]
    assert any(text in label for label in labels)


def test_parts_of_a_search_may_be_missing() -> None:
    data = plan()
    data["search"] |= {"history": [], "chosen": None, "budget": None}
    assert list(plan_figures(data)) == NAMES[:-1]
    assert list(plan_figures({"sites": [], "search": plan()["search"]})) == NAMES[-2:]


def test_pictures_leave_no_settings_behind() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plan_figures_png({"sites": [site("c", 0, 2, [1])]})
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not matplotlib.pyplot.get_fignums()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["sites"][2].pop("units"), r"'sites\[2\]' has no 'units'"),
        (lambda p: p.pop("sites"), "'sites' has no 'sites'"),
        (lambda p: p["sites"][0].update(removed=[3]), r"'sites\[0\]' cannot be drawn: .*removed"),
        (lambda p: p["sites"][0].update(removed=[1, 1]), "removed units"),
        (lambda p: p["sites"][0].update(scores=[1.0]), "1 scores for 3 units"),
        (lambda p: p["sites"].append("x"), r"'sites\[16\]' cannot be drawn"),
        (
            lambda p: p["sites"].append(linear("nonzeros=9 shape=2x4")),
            r"'sites\[16\]' cannot be drawn: .*nonzeros is 9",
        ),
        (lambda p: p["search"]["history"][0].pop("best"), "'search' has no 'best'"),
        (lambda p: p["search"]["evaluated"].append({"cost": "much", "score": 1}), "'search' cannot be drawn"),
    ],
)
def test_a_malformed_plan_is_an_error(change: Any, message: str) -> None:
    data = copy.deepcopy(plan())
    change(data)
    with pytest.raises(InputError, match=message):
        plan_figures(data)


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    for data in ({"sites": []}, {"sites": [], "search": {"history": [], "evaluated": []}}):
        with pytest.raises(InputError, match="nothing to draw"):
            plot_plan(data, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot make the folder"):
        plot_plan(plan(), tmp_path / "file")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (plan_figures, plan_figures_png, plan_figures_svg, lambda p: plot_plan(p, tmp_path)):
        with pytest.raises(GraphlatheError, match=r"needs? the package matplotlib\n.*graphlathe\[plot\]"):
            draw(plan())


def test_importing_does_not_load_matplotlib() -> None:
    code = "import sys, graphlathe.tools.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
