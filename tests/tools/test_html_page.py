"""The HTML page in a browser: it loads nothing, and what it shows is what the program says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graphlathe.ir.cost import cost
from graphlathe.ir.from_text import parse_program
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import ORIGIN, Program
from graphlathe.passes.base import Context
from graphlathe.passes.layers.drop_layers import DropLayers
from graphlathe.tools.console import count
from graphlathe.tools.html.matching import match
from graphlathe.tools.html.page import LIBRARIES, LICENCES, PageOptions, html_page
from graphlathe.tools.html.weights import BINS
from tests.browser import NAMES, VARIABLE, Browser, find_chromium
from tests.zoo_programs import traced

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None,
        reason=f"needs a Chromium: none of {', '.join(NAMES)} is on the path, and {VARIABLE} is not set",
    ),
    # One browser for all, in one worker.
    pytest.mark.xdist_group("browser"),
]
TREE = "document.querySelectorAll('#tree .row').length"
LAYOUTS = "Number(document.documentElement.dataset.layouts)"
# All boxes that are drawn, with what is written in them.
BOXES = """[...document.querySelectorAll('.scene g.item')].map((g) => {
  const box = d3.select(g).datum();
  const measured = [...g.querySelectorAll('text')].map((text) => text.getBBox());
  const texts = measured.map((b) => [b.x, b.y, b.width, b.height]);
  return { key: box.key, x: box.x, y: box.y, width: box.width, height: box.height, texts,
           parent: box.parent ? box.parent.key : null, side: Number(g.closest('.view').dataset.side) };
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of each model, and one of two programs."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("llama", "resnet", "plain_densenet"):
        (folder / f"{name}.html").write_text(html_page(traced(name), PageOptions(name)))
    (folder / "two.html").write_text(html_page(before(), PageOptions("before", "after"), after()))
    (folder / "large.html").write_text(html_page(large(), PageOptions("large")))
    return folder


def before() -> Program:
    return traced("llama")


def after() -> Program:
    """Without a block, one activation replaced by another, one number of an argument changed."""
    program = before().clone()
    DropLayers(indices=(1,)).run(program, Context())
    text = program.to_text().replace("aten.silu", "aten.relu", 1)
    return parse_program(text, program.weights)


class Step(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(8), torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def large(blocks: int = 4000) -> Program:
    """A stream of residual blocks of five operators each."""
    one = trace(Step(), (torch.zeros(2, 8),))
    lines = one.to_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  %0 ="))
    body, x = lines[start:-2], "%x"
    text = lines[:start]
    for block in range(blocks):
        first = block * len(body)
        for i, line in reversed(list(enumerate(body))):
            body_line = line.replace("%x", "%in").replace(f"%{i} =", f"%out{i} =")
            for k in range(len(body)):
                body_line = body_line.replace(f"%{k},", f"%{first + k},").replace(f"%{k})", f"%{first + k})")
            text.insert(start + first, body_line.replace(f"%out{i}", f"%{first + i}").replace("%in", x))
        x = f"%{first + len(body) - 1}"
    return parse_program("\n".join([*text, f"  return ({x},)", "}", ""]), one.weights)


def show(browser: Browser, page: Path, scheme: str = "light") -> None:
    browser.scheme(scheme)
    browser.open(page)


def do(browser: Browser, script: str) -> None:
    """Run a script and wait until what it opened is drawn."""
    drawn = browser.evaluate(LAYOUTS)
    browser.evaluate(f"(() => {{ {script} }})()")
    browser.wait(f"{LAYOUTS} > {drawn}")
    browser.settle()


def row_of(browser: Browser, label: str) -> int:
    """The place of the row with a label, in the tree."""
    found = browser.evaluate(
        "[...document.querySelectorAll('#tree .row')]"
        f".findIndex((r) => r.querySelector('.name').textContent == {json.dumps(label)})"
    )
    assert found >= 0, label
    return int(browser.evaluate(f"document.querySelectorAll('#tree .row')[{found}].dataset.at"))


def details(browser: Browser) -> dict[str, str]:
    """What the panel says, by row; under ``""`` all of it."""
    rows = browser.evaluate(
        "[...document.querySelectorAll('#details tr')].map((r) => [...r.children].map((c) => c.textContent))"
    )
    found = {row[0]: " | ".join(row[1:]) for row in rows}
    return {**found, "": browser.evaluate("document.getElementById('details').textContent")}


@pytest.mark.parametrize("name", ["llama", "resnet", "plain_densenet", "two", "large"])
def test_it_loads_nothing_and_complains_of_nothing(browser: Browser, pages: Path, name: str) -> None:
    show(browser, pages / f"{name}.html")
    assert browser.problems == []
    assert browser.evaluate("performance.getEntriesByType('resource').map((e) => e.name)") == browser.evaluate(
        "performance.getEntriesByType('resource').map((e) => e.name).filter((n) => n.startsWith('blob:'))"
    )
    assert browser.evaluate(TREE) >= 3


def test_the_browser_tells_what_a_page_loads(browser: Browser, tmp_path: Path) -> None:
    """That the test above can fail."""
    bad = '<html data-layouts="1"><body><script src="http://127.0.0.1:9/x.js"></script></body></html>'
    (tmp_path / "bad.html").write_text(bad)
    browser.open(tmp_path / "bad.html")
    browser.wait("document.readyState == 'complete'")
    assert any("http://127.0.0.1:9/x.js" in problem for problem in browser.problems)


def test_licences_can_be_read_in_it(browser: Browser, pages: Path) -> None:
    show(browser, pages / "llama.html")
    browser.click("#keys")
    browser.click("#help summary")
    shown = browser.evaluate("document.querySelector('#help pre').innerText")
    assert "Mike Bostock" in shown and "Eclipse Public License - v 2.0" in shown
    assert len(LIBRARIES) == len(LICENCES)
    browser.press("Escape")


@pytest.mark.parametrize("name", ["llama", "resnet", "plain_densenet", "two", "large"])
@pytest.mark.parametrize("opened", [0, 1, 8])
def test_boxes_lie_inside_each_other_and_apart_and_texts_inside_boxes(
    browser: Browser, pages: Path, name: str, opened: int
) -> None:
    show(browser, pages / f"{name}.html")
    if opened:
        closed = "Model.groups.filter((g) => g.depth && g.items.length < 60 && !State.isOpen(g))"
        do(browser, f"for (const g of {closed}.slice(0, {opened})) State.setOpen(g, true)")
    boxes = browser.evaluate(BOXES)
    assert len(boxes) >= 3
    for side in {box["side"] for box in boxes}:
        there = {box["key"]: box for box in boxes if box["side"] == side}
        check_places(there)


def check_places(boxes: dict[str, dict[str, Any]]) -> None:
    def inside(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return (
            a["x"] >= b["x"] - 0.5
            and a["y"] >= b["y"] - 0.5
            and a["x"] + a["width"] <= b["x"] + b["width"] + 0.5
            and a["y"] + a["height"] <= b["y"] + b["height"] + 0.5
        )

    def apart(a: dict[str, Any], b: dict[str, Any]) -> bool:
        beside = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
        return beside or a["y"] + a["height"] <= b["y"] or b["y"] + b["height"] <= a["y"]

    by_parent: dict[str | None, list[dict[str, Any]]] = {}
    for box in boxes.values():
        by_parent.setdefault(box["parent"], []).append(box)
        if box["parent"] is not None:
            assert inside(box, boxes[box["parent"]]), box
        for x, y, width, height in box["texts"]:
            assert x >= 0 and x + width <= box["width"] + 1 and y >= -1 and y + height <= box["height"] + 1, box
    for members in by_parent.values():
        for i, a in enumerate(members):
            assert all(apart(a, b) for b in members[i + 1 :]), a


class TestTree:
    def test_rows_open_and_close(self, browser: Browser, pages: Path) -> None:
        show(browser, pages / "llama.html")
        do(browser, "State.collapseAll()")
        run = row_of(browser, "3 x block [attention, mlp]")
        rows = browser.evaluate(TREE)
        browser.click(f"#row-{run} .twist")
        assert browser.evaluate(TREE) == rows + 3
        assert browser.evaluate(f"document.getElementById('row-{run}').getAttribute('aria-expanded')") == "true"
        browser.settle()
        assert browser.evaluate("document.querySelectorAll('g.item.open').length") > 0
        browser.click(f"#row-{run} .twist")
        assert browser.evaluate(TREE) == rows
        browser.wait("document.querySelectorAll('g.item.open').length == 0")

    def test_also_with_keys_and_in_the_graph(self, browser: Browser, pages: Path) -> None:
        show(browser, pages / "llama.html")
        do(browser, "State.collapseAll()")
        rows = browser.evaluate(TREE)
        browser.evaluate("document.getElementById('tree').focus()")
        for key in ("Home", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"):
            browser.press(key)
        assert browser.evaluate(TREE) == rows + 3
        browser.press("ArrowLeft")
        assert browser.evaluate(TREE) == rows
        browser.settle()
        run = browser.evaluate("`g${Model.groups.find((g) => g.kind == 'run').id}`")
        browser.click(f"g.item[data-key='{run}']", times=2)
        browser.wait("document.querySelectorAll('g.item.open').length > 0")
        assert browser.evaluate(TREE) == rows + 3

    def test_sites_are_what_the_tree_is_made_of(self, browser: Browser, pages: Path) -> None:
        show(browser, pages / "llama.html")
        kinds = browser.evaluate("Model.groups.map((g) => g.kind)")
        assert kinds.count("attention") == kinds.count("mlp") == kinds.count("block") == 3
        assert kinds.count("embedding") == kinds.count("head") == 1
        roles = browser.evaluate("Model.sides[0].nodes.map((n) => n.role).filter(Boolean)")
        for role in ("query", "key", "value", "output", "gate", "up", "down"):
            assert roles.count(role) == 3, role
        show(browser, pages / "resnet.html")
        assert browser.evaluate("Model.groups.filter((g) => g.kind == 'stage').length") == 2

    def test_bars_are_shares(self, browser: Browser, pages: Path) -> None:
        show(browser, pages / "llama.html")
        do(browser, "State.collapseAll()")
        widths = browser.evaluate(
            "[...document.querySelectorAll('#tree .bars b')].map((b) => parseFloat(b.style.width))"
        )
        shares = browser.evaluate("Model.root.items.map((g) => 100 * g.sums[0].params / Model.root.sums[0].params)")
        assert widths == pytest.approx([share for share in shares if share], abs=0.06)
        assert sum(shares) == pytest.approx(100)


class TestDetails:
    def test_of_an_operator(self, browser: Browser, pages: Path) -> None:
        program = traced("llama")
        node = next(n for n in program.graph.nodes if str(n.target) == "aten.linear.default")
        weight = program.weights[str(node.args[1].target)]
        spent = next(item for item in cost(program).at().nodes if item.node == node.name)
        show(browser, pages / "llama.html")
        do(browser, f"State.reveal(Model.sides[0].nodes.find((n) => n.name == {json.dumps(node.name)}))")
        number = browser.evaluate(f"Model.sides[0].nodes.find((n) => n.name == {json.dumps(node.name)}).id")
        browser.evaluate(f"State.select(Model.sides[0].nodes[{number}])")  # brings it into view
        browser.evaluate("State.select(null)")
        browser.click(f"g.item[data-key='n{number}'] .body")
        shown = details(browser)
        assert shown["name"] == node.name and shown["role"] == "query" and shown["type"] == "f32[B, S, 32]"
        assert shown["at these sizes"] == "f32[2, 12, 32]"
        assert shown["MACs"].startswith(f"{count(spent.macs)} = ") and "B*S" in shown["MACs"]
        assert shown["parameters"] == count(weight.numel)
        assert shown["from"] == node.meta[ORIGIN] and shown["made by"] == "the front end"
        numbers = weight.tensor()
        for word, value in (("min", numbers.min()), ("max", numbers.max()), ("std", numbers.std(correction=0))):
            text = shown[""].split(f"{word} ", 1)[1].split(",")[0].split()[0]
            assert float(text.replace("−", "-")) == pytest.approx(float(value), rel=1e-3), word
        bars = browser.evaluate("document.querySelectorAll('#details .histogram rect').length")
        assert 4 < bars <= BINS + 1

    def test_provenance_of_what_a_pass_made(self, browser: Browser, tmp_path: Path) -> None:
        program = traced("llama").clone()
        node = next(n for n in program.graph.nodes if n.op == "call_function")
        node.meta["made_by"] = "some-pass"
        (tmp_path / "made.html").write_text(html_page(program))
        show(browser, tmp_path / "made.html")
        browser.evaluate(f"State.select(Model.sides[0].nodes.find((n) => n.name == {json.dumps(node.name)}))")
        assert details(browser)["made by"] == "some-pass"

    def test_of_a_site_and_of_a_weight(self, browser: Browser, pages: Path) -> None:
        show(browser, pages / "llama.html")
        browser.click(f"#row-{row_of(browser, 'attention')}")
        shown = details(browser)
        assert "4 heads of 8" in shown[""] and shown["parameters"].startswith("3.1 k")
        browser.evaluate("State.select({ weight: Model.sides[0].weights[0] })")
        assert "Read by" in details(browser)[""]

    def test_of_the_whole(self, browser: Browser, pages: Path) -> None:
        show(browser, pages / "llama.html")
        shown = details(browser)
        assert shown["parameters"] == count(traced("llama").parameter_count)
        assert shown["input"] == "input_ids i64[B, S]"


class TestSearch:
    def test_finds_shows_and_selects(self, browser: Browser, pages: Path) -> None:
        show(browser, pages / "llama.html")
        browser.press("/")
        browser.write("layers.2 down_proj")
        found = browser.evaluate("[...document.querySelectorAll('#hits li')].map((l) => l.textContent)")
        assert found[-1].startswith("1 operators, 1 weights") and "layers.2.mlp.down_proj" in found[0]
        browser.press("Enter", "\r")
        browser.wait("document.querySelector('#tree .row.selected') !== null")
        assert details(browser)["from"] == "model.layers.2.mlp.down_proj"
        browser.wait("document.querySelector('g.item.leaf.selected') !== null")

    @pytest.mark.parametrize(
        "query", ["op:linear", "linear", "role:query", "weight:norm", "name:add_1", "nothing like it"]
    )
    def test_counts(self, browser: Browser, pages: Path, query: str) -> None:
        show(browser, pages / "llama.html")
        nodes, weights = browser.evaluate(
            f"(() => {{ const f = Search.find({json.dumps(query)}); return [f.nodes.length, f.weights.length]; }})()"
        )
        program = traced("llama")
        operators = [n for n in program.graph.nodes if n.op == "call_function"]
        expected = {
            "op:linear": (sum("linear" in str(n.target) for n in operators), 0),
            "role:query": (3, 0),
            "weight:norm": (0, sum("norm" in name for name in program.used_weights())),
            "name:add_1": (sum("add_1" in n.name for n in operators), 0),
            "nothing like it": (0, 0),
        }
        if query in expected:
            assert (nodes, weights) == expected[query]
        else:
            assert nodes >= expected["op:linear"][0]

    def test_leaving_it_shows_no_hits(self, browser: Browser, pages: Path) -> None:
        show(browser, pages / "llama.html")
        browser.press("/")
        browser.write("nothing like this")
        assert "nothing found" in browser.evaluate("document.getElementById('hits').textContent")
        browser.press("Escape")
        assert browser.evaluate("document.getElementById('hits').hidden")


def drawn_in(browser: Browser, side: int, selector: str) -> int:
    """How many elements of one side's drawing a selector finds."""
    return int(browser.evaluate(f"document.querySelectorAll(\".view[data-side='{side}'] {selector}\").length"))


class TestTwo:
    def test_parts_are_marked_as_they_are_matched(self, browser: Browser, pages: Path) -> None:
        a, b = before(), after()
        found = match(a, b)
        operators = [[n for n in p.graph.nodes if n.op == "call_function"] for p in (a, b)]
        removed = sum(n not in found.forward for n in operators[0])
        added = len(operators[1]) - sum(n in found.forward for n in operators[0])
        show(browser, pages / "two.html")
        counts = browser.evaluate("Model.counts")
        assert (counts["removed"], counts["added"]) == (removed, added) and removed > added == 1
        assert counts["changed"] == len(found.changes) > 0

    def test_marks_are_in_the_tree_and_in_both_drawings(self, browser: Browser, pages: Path) -> None:
        show(browser, pages / "two.html")
        # The block that is gone, in the drawing of the first side only.
        block = "Model.groups.find((g) => g.kind == 'block' && g.status == 'removed')"
        gone = browser.evaluate(f"{block}.id")
        do(browser, f"State.reveal({block}) || State.overview()")
        drawn = [drawn_in(browser, side, f"g.item.removed[data-key='g{gone}']") for side in (0, 1)]
        assert drawn[0] >= 1 and drawn[1] == 0
        assert browser.evaluate("document.querySelector('#tree .row.removed .mark').textContent") == "−"
        # The replaced activation: removed on the left, added on the right.
        do(
            browser,
            "for (const side of Model.sides) for (const n of side.nodes)"
            " if (['removed', 'added'].includes(n.status) && ['silu', 'relu'].includes(n.op)) State.reveal(n)",
        )
        browser.wait("document.querySelectorAll('g.item.leaf.added').length == 1")
        assert drawn_in(browser, 1, "g.item.leaf.added") == 1
        written = [
            browser.evaluate(f"document.querySelector('g.item.leaf.added .{name}').textContent")
            for name in ("title", "mark")
        ]
        assert written == ["relu", "+"]
        assert all(drawn_in(browser, side, "g.item.changed") for side in (0, 1))

    def test_equal_programs_have_no_difference(self, browser: Browser, tmp_path: Path) -> None:
        (tmp_path / "same.html").write_text(html_page(before(), PageOptions("a", "b"), before().clone()))
        show(browser, tmp_path / "same.html")
        assert "No difference." in details(browser)[""]
        marked = ", ".join(f".row.{status}, .item.{status}" for status in ("removed", "added", "changed"))
        assert browser.evaluate(f"document.querySelectorAll('{marked}').length") == 0

    def test_a_pair_shows_both_sides(self, browser: Browser, pages: Path) -> None:
        show(browser, pages / "two.html")
        browser.evaluate("State.select(Model.sides[0].nodes.find((n) => n.status == 'changed'))")
        shown = details(browser)
        assert "Differs in" in shown[""] and " | " in shown["name"]


class TestLarge:
    """20,000 operators: only what is open costs anything."""

    def test_starts_with_little_and_opens_on_demand(self, browser: Browser, pages: Path) -> None:
        show(browser, pages / "large.html")
        assert browser.evaluate("Model.sides[0].nodes.length") == 20_002
        assert browser.evaluate("document.getElementsByTagName('*').length") < 3000
        last = "Model.sides[0].nodes[20000]"
        do(browser, f"State.reveal({last}); State.select({last})")
        browser.wait("document.querySelector('g.item.leaf.selected') !== null")
        assert browser.evaluate("document.querySelector('#tree .row.selected') !== null")
        assert browser.evaluate("document.getElementsByTagName('*').length") < 6000
        assert browser.problems == []

    def test_what_is_too_much_is_refused_and_said(self, browser: Browser, pages: Path) -> None:
        show(browser, pages / "large.html")
        do(
            browser,
            "for (const g of Model.groups.filter((g) => g.kind == 'run' || g.kind == 'step')) State.setOpen(g, true)",
        )
        browser.wait("document.getElementById('status').textContent.includes('too many to draw')")
        assert browser.evaluate("document.getElementsByTagName('*').length") < 6000
        do(browser, "State.collapseAll()")
        browser.wait("document.getElementById('status').textContent == ''")


def test_dark_and_light(browser: Browser, pages: Path) -> None:
    def luminance(what: str) -> float:
        color = browser.evaluate(f"getComputedStyle(document.body).{what}")
        return sum(map(float, color[4:-1].split(","))) / 765

    show(browser, pages / "llama.html", "dark")
    assert luminance("backgroundColor") < 0.2 and luminance("color") > 0.8
    browser.press("t")
    assert luminance("backgroundColor") > 0.8 and luminance("color") < 0.2
    browser.press("t")
    show(browser, pages / "llama.html", "light")


def test_zoom_and_pan(browser: Browser, pages: Path) -> None:
    show(browser, pages / "llama.html")
    where = "document.querySelector('.scene').getAttribute('transform')"
    states = [browser.evaluate(where)]
    for button in ("in", "out", "fit"):
        browser.click(f"#tools [data-do='{button}']")
        states.append(browser.evaluate(where))
    assert len(set(states)) >= 3
    drawing = browser.evaluate(
        "(() => { const s = document.querySelector('.scene').getBoundingClientRect();"
        " const v = document.querySelector('.view svg').getBoundingClientRect();"
        " return s.left >= v.left - 1 && s.right <= v.right + 1 && s.top >= v.top - 1 && s.bottom <= v.bottom + 1; })()"
    )
    assert drawing, "all of it is in view"
