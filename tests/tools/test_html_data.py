"""The data of the HTML page: everything is there once, sums are the costs, and nothing in a name can do harm."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import pytest
import torch

from graphlathe.ir.cost import cost
from graphlathe.ir.from_text import parse_program
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.rewrite import Rewriter
from graphlathe.ir.text import print_program
from graphlathe.ir.weights import Weight
from graphlathe.passes.base import Context
from graphlathe.passes.layers.drop_layers import DropLayers
from graphlathe.tools.html.groups import LARGEST, interleave
from graphlathe.tools.html.matching import Change, Matching, match
from graphlathe.tools.html.page import LIBRARIES, SCRIPTS, STYLES, WORKER, PageOptions, html_page, page_data
from graphlathe.tools.html.weights import all_statistics
from tests.zoo_programs import traced

# A decoder, an encoder-decoder, a CNN with unequal blocks, two without a residual stream, one that ties its weights.
MODELS = ("llama", "t5", "resnet", "plain_densenet", "plain_lstm", "gpt2")
ASSETS = resources.files("graphlathe.tools.html")


class Branching(torch.nn.Module):
    """Control flow: nested graphs that read weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda v: self.inner(v), lambda v: v * 2, (x,))


def branching() -> Program:
    return trace(Branching(), (torch.ones(2, 4),))


def groups(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for item in items:
        yield item
        yield from groups(item.get("children", []))


def placed(data: dict[str, Any], side: int = 0) -> Counter[int]:
    """How often each node stands in the tree."""
    return Counter(row[side] for group in groups(data["tree"]) for row in group.get("nodes", []) if row[side] >= 0)


def without_layer(program: Program, index: int) -> Program:
    after = program.clone()
    DropLayers(indices=(index,)).run(after, Context())
    return after


@pytest.mark.parametrize("name", [*MODELS, "branching"])
class TestOneProgram:
    def data(self, name: str) -> tuple[Program, dict[str, Any]]:
        program = branching() if name == "branching" else traced(name)
        return program, page_data(program, PageOptions())

    def test_every_node_stands_in_the_tree_once(self, name: str) -> None:
        program, data = self.data(name)
        nodes = sum(node.op != "get_attr" for graph in program.graphs.values() for node in graph.nodes)
        assert placed(data) == Counter(range(nodes))

    def test_sums_are_the_programs_cost(self, name: str) -> None:
        program, data = self.data(name)
        columns, total = data["sides"][0]["nodes"], cost(program).at()
        assert sum(columns["macs"]) == total.macs
        assert sum(columns["moved"]) == total.bytes_moved
        assert sum(columns["params"]) == total.params == program.parameter_count
        assert data["sides"][0]["totals"]["peak"] == total.peak_activation_bytes

    def test_columns_are_complete_and_every_reference_is_there(self, name: str) -> None:
        program, data = self.data(name)
        side, texts = data["sides"][0], data["texts"]
        columns = side["nodes"]
        assert len({len(column) for column in columns.values()}) == 1
        assert len(texts) == len(set(texts))
        for key in ("op", "what", "role", "type", "at", "origin", "by", "call", "formula"):
            assert all(0 <= place < len(texts) for place in columns[key]), key
        for call, op, reads in zip(columns["call"], columns["op"], columns["reads"], strict=True):
            gaps = texts[call].count("\x01")
            assert gaps == len(reads) or texts[op] in ("input", "output")
            for read in reads:
                assert (isinstance(read, str) and read in program.subgraphs) or (
                    -len(side["weights"]) <= read < len(columns["name"])
                )

    def test_the_numbers_in_shapes_are_those_of_a_run(self, name: str) -> None:
        program, data = self.data(name)
        columns, texts = data["sides"][0]["nodes"], data["texts"]
        outputs = [v for v in program.main.output_values if hasattr(v, "name")]
        place = {n: i for i, n in enumerate(columns["name"])}
        feeds = {
            spec.name: torch.zeros(
                [program.main.dims.evaluate(size, {}) for size in spec.shape], dtype=spec.dtype or torch.float32
            )
            for spec in program.inputs
        }
        for node, value in zip(outputs, program.run(feeds).values(), strict=True):
            row = place[node.name]
            shown = texts[columns["at"][row]] or texts[columns["type"][row]]
            assert shown.endswith(f"[{', '.join(map(str, value.shape))}]")

    def test_every_weight_that_is_used_is_listed_once(self, name: str) -> None:
        program, data = self.data(name)
        assert [w["name"] for w in data["sides"][0]["weights"]] == sorted(program.used_weights() & set(program.weights))

    def test_nothing_opens_into_too_much(self, name: str) -> None:
        _, data = self.data(name)
        assert all(
            len(group.get("nodes", [])) + len(group.get("children", [])) <= LARGEST for group in groups(data["tree"])
        )

    def test_equal_programs_give_equal_pages(self, name: str) -> None:
        program, _ = self.data(name)
        assert html_page(program) == html_page(program.clone())


class TestSites:
    def test_runs_of_equal_blocks_open_into_numbered_blocks(self) -> None:
        data = page_data(traced("llama"), PageOptions())
        run = next(group for group in data["tree"] if group["kind"] == "run")
        assert run["label"] == "3 x block [attention, mlp]" and run["origin"] == "model.layers.0-2"
        assert [block["label"] for block in run["children"]] == ["block 0", "block 1", "block 2"]
        assert [site["label"] for site in run["children"][1]["children"]] == ["attention", "mlp"]

    def test_long_lists_open_in_steps(self) -> None:
        class Long(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for _ in range(LARGEST * LARGEST // 8):
                    x = x.sin()
                return x

        program = trace(Long(), (torch.zeros(2),))
        data = page_data(program, PageOptions())
        assert placed(data) == Counter(range(LARGEST * LARGEST // 8 + 2))
        sizes = [len(g.get("nodes", [])) + len(g.get("children", [])) for g in groups(data["tree"])]
        assert max(sizes) == LARGEST

    def test_sizes_decide_the_costs(self) -> None:
        program = traced("llama")
        data = page_data(program, PageOptions(sizes={"B": 1, "S": 64}))
        assert sum(data["sides"][0]["nodes"]["macs"]) == cost(program).at(B=1, S=64).macs

    @pytest.mark.parametrize(
        ("a", "b", "pairs", "expected"),
        [
            ("abc", "abc", {0: 0, 1: 1, 2: 2}, "aa bb cc"),
            ("abc", "ac", {0: 0, 2: 1}, "aa b- cc"),
            ("ac", "xaybz", {0: 1}, "-x aa -y -b -z c-"),
            ("", "xy", {}, "-x -y"),
        ],
    )
    def test_two_lists_as_one(self, a: str, b: str, pairs: dict[int, int], expected: str) -> None:
        assert " ".join(f"{x or '-'}{y or '-'}" for x, y in interleave(a, b, pairs)) == expected


class TestMatching:
    @pytest.mark.parametrize("name", MODELS)
    def test_a_copy_with_other_names_corresponds_wholly(self, name: str) -> None:
        program = traced(name)
        copy = parse_program(print_program(program), program.weights)
        found = match(program, copy)
        operators = [node for node in program.graph.nodes if node.op != "get_attr"]
        others = [node for node in copy.graph.nodes if node.op != "get_attr"]
        assert found.changes == {}
        # Graph order is the text's order: the n-th operator is the n-th.
        assert [found.forward[node] for node in operators] == others

    def test_a_dropped_layer_is_what_was_removed(self) -> None:
        before = traced("llama")
        after = without_layer(before, 1)
        self.check_layer(before, match(before, after))

    def test_also_between_programs_that_share_no_names(self) -> None:
        before = traced("llama")
        after = without_layer(before, 1)
        renamed = parse_program(print_program(after), after.weights)
        self.check_layer(before, match(before, renamed))

    def test_also_where_weights_are_read_through_other_operators_and_all_blocks_are_alike(self) -> None:
        class Blocks(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mats = torch.nn.ParameterList(torch.randn(2, 4, 4) for _ in range(6))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for mats in self.mats:
                    x = x + (x.square().mean(-1, keepdim=True) * x) @ mats[0].t()
                    x = x + (x @ mats[1].t()).relu()
                return x

        before = trace(Blocks(), (torch.zeros(2, 3, 4),))
        order = [n for n in before.graph.nodes if n.op == "call_function"]
        step = len(order) // 6
        gone = order[2 * step : 4 * step]
        after = before.clone()
        twins = dict(zip(before.graph.nodes, after.graph.nodes, strict=True))
        rewriter = Rewriter(after, "cut")
        rewriter.replace(twins[gone[-1]], twins[order[2 * step - 1]])
        rewriter.erase_dead()
        renamed = parse_program(print_program(after), after.weights)
        found = match(before, renamed)
        assert [n for n in order if n not in found.forward] == gone
        assert set(found.changes) <= set(gone[-1].users), "only what read the last of them reads something else"

    def check_layer(self, before: Program, found: Matching) -> None:
        lost = [n for n in before.graph.nodes if n.op == "call_function" and n not in found.forward]
        layer = [n for n in before.graph.nodes if str(n.meta.get("origin")).startswith("model.layers.1")]
        operators = [n for n in layer if n.op == "call_function"]
        assert set(lost) == set(operators) and lost
        # Only what read the layer's result reads something else now.
        last = {n for n in before.graph.nodes if n.op == "call_function" and n not in lost} & {
            user for node in operators for user in node.users
        }
        assert set(found.changes) == last
        assert set(found.changes.values()) == {Change.INPUTS}

    def test_changed_numbers_shapes_and_arguments_are_named(self) -> None:
        before = traced("plain_densenet")
        after = before.clone()
        name = sorted(w for w in after.used_weights() if after.weights[w].shape and "conv" not in w)[0]
        after.weights[name] = after.weights[name].scale(2.0)
        known = all_statistics([p.weights[w] for p in (before, after) for w in sorted(p.used_weights())], 1 << 30)
        found = match(before, after, statistics=known)
        readers = {n for n in before.graph.nodes if any(str(a.target) == name for a in n.all_input_nodes)}
        assert found.changes == {reader: Change.NUMBERS for reader in readers} and readers
        assert match(before, after).changes == {}, "numbers that were not read are not compared"

    def test_changed_arguments(self) -> None:
        class Leaky(torch.nn.Module):
            def __init__(self, slope: float) -> None:
                super().__init__()
                self.slope = slope

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.leaky_relu(x.exp(), self.slope).sin()

        a, b = (trace(Leaky(slope), (torch.zeros(2, 3),)) for slope in (0.1, 0.2))
        found = match(a, b)
        changed = {node.name: change for node, change in found.changes.items()}
        assert changed == {"leaky_relu": Change.ARGUMENTS} and len(found.forward) == 5

    def test_changed_types(self) -> None:
        class Double(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.exp().sin()

        a, b = (trace(Double(), (torch.zeros(2, width),)) for width in (3, 4))
        assert set(match(a, b).changes.values()) == {Change.TYPE}

    def test_replaced_operators_are_removed_and_added(self) -> None:
        before = traced("plain_densenet")
        after = before.clone()
        relu = next(n for n in after.graph.nodes if "relu" in str(n.target))
        rewriter = Rewriter(after, "test")
        with rewriter.before(relu):
            rewriter.replace(relu, rewriter.call(torch.ops.aten.tanh.default, relu.args[0]))
        data = page_data(before, PageOptions(), after)
        kept = {a for a, _ in data["pairs"]}, {b for _, b in data["pairs"]}
        names = [side["nodes"]["name"] for side in data["sides"]]
        lost, new = ([n for i, n in enumerate(names[s]) if i not in kept[s]] for s in (0, 1))
        assert lost == [relu.name] and len(new) == 1
        row = names[1].index(new[0])
        assert data["texts"][data["sides"][1]["nodes"]["by"][row]] == "test"


class TestTwoPrograms:
    def test_every_node_of_both_stands_in_the_tree_once(self) -> None:
        before = traced("llama")
        data = page_data(before, PageOptions(), without_layer(before, 1))
        for side in (0, 1):
            assert placed(data, side) == Counter(range(len(data["sides"][side]["nodes"]["name"])))

    def test_the_removed_block_has_no_second_side(self) -> None:
        before = traced("llama")
        data = page_data(before, PageOptions(), without_layer(before, 1))
        blocks = [group for group in groups(data["tree"]) if group["kind"] == "block"]
        sides = [{(a >= 0, b >= 0) for inner in groups([block]) for a, b in inner.get("nodes", [])} for block in blocks]
        assert [block["label"] for block in blocks] == ["block 0", "block 1", "block 2"]
        assert sides == [{(True, True)}, {(True, False)}, {(True, True)}]

    def test_costs_are_taken_at_the_same_sizes(self) -> None:
        first = traced("llama")
        second = parse_program(re.sub(r"dim S = \d+", "dim S = 31", print_program(first)), first.weights)
        data = page_data(first, PageOptions(sizes={"S": 9}), second)
        totals = [side["totals"] for side in data["sides"]]
        assert totals[0] == totals[1]

    def test_of_models_that_have_nothing_in_common(self) -> None:
        data = page_data(traced("llama"), PageOptions(), traced("plain_densenet"))
        for side in (0, 1):
            assert placed(data, side) == Counter(range(len(data["sides"][side]["nodes"]["name"])))


class Reader(HTMLParser):
    """Elements, and the text of the one with an id."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = str(dict(attrs).get("id") or tag)

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


class TestPage:
    HOSTILE = '</script><script>alert("1")</script><!-- \' & $data ${x} \u2028 \ud800 é'

    def test_names_cannot_leave_the_data(self) -> None:
        program = trace(torch.nn.Linear(3, 2), (torch.zeros(1, 3),)).clone()
        reader = next(n for n in program.graph.nodes if n.op == "get_attr")
        program.weights[self.HOSTILE] = program.weights[str(reader.target)]
        reader.target = self.HOSTILE
        for node in program.graph.nodes:
            node.meta["origin"] = self.HOSTILE
        program.metadata["producer"] = self.HOSTILE
        program.main.outputs = (self.HOSTILE,)
        page = html_page(program, PageOptions(title=self.HOSTILE))
        page.encode()  # a lone surrogate must not stop it from being written
        plain = read(html_page(traced("plain_densenet")))
        found = read(page)
        assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
        data = json.loads(found.texts["data"])
        assert data["sides"][0]["title"] == self.HOSTILE
        assert self.HOSTILE in [w["name"] for w in data["sides"][0]["weights"]]
        assert self.HOSTILE in data["texts"]

    def test_nothing_is_loaded(self) -> None:
        page = html_page(traced("plain_densenet"))
        found = read(page)
        for tag, attributes in found.tags:
            loading = {"src", "href", "srcset", "data", "action", "poster", "background"} & set(attributes)
            assert not loading and tag not in ("link", "iframe", "img", "object", "base", "form"), (tag, attributes)
        policy = next(a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None and "default-src 'none'" in policy and "connect-src" not in policy
        assert not re.search(r"https?:|//\w+\.\w+/", policy)
        styles = "\n".join(ASSETS.joinpath(name).read_text() for name in STYLES)
        assert "url(" not in styles and "@import" not in styles
        ours = "\n".join(ASSETS.joinpath(name).read_text() for name in SCRIPTS)
        assert not re.search(r"https?:|\bfetch\(|XMLHttpRequest|\bimport\(|innerHTML|\beval\(", ours)

    def test_all_our_files_are_in_it(self) -> None:
        ours = {p.name for p in ASSETS.iterdir() if p.name.endswith((".js", ".css"))}
        assert ours == {*SCRIPTS, *STYLES}

    def test_a_weight_without_numbers_says_so(self) -> None:
        program = traced("plain_densenet").clone()
        name = sorted(program.used_weights())[0]
        program.weights[name] = Weight.from_tensor(torch.empty(program.weights[name].shape, device="meta"))
        listed = page_data(program, PageOptions())["sides"][0]["weights"]
        assert "stats" not in listed[0] and "meta" in listed[0]["none"] and "stats" in listed[1]

    def test_no_statistics_on_request(self) -> None:
        data = page_data(traced("plain_densenet"), PageOptions(numbers=0))
        assert not any("stats" in weight for weight in data["sides"][0]["weights"])

    def test_infinite_numbers_do_not_break_the_data(self) -> None:
        program = traced("plain_densenet").clone()
        for name, number in zip(
            sorted(program.used_weights()), (float("nan"), float("inf"), 3e38, -3e38), strict=False
        ):
            program.weights[name] = Weight.from_tensor(torch.full(program.weights[name].shape, number))
        json.loads(read(html_page(program)).texts["data"])


def test_the_vendored_files_are_those_that_their_readme_says() -> None:
    vendor = ASSETS.joinpath("vendor")
    listed = dict(re.findall(r"^\| `([^`]+)` .*`([0-9a-f]{64})` \|$", vendor.joinpath("README.md").read_text(), re.M))
    assert set(listed) == {*LIBRARIES, WORKER}
    for name, digest in listed.items():
        assert hashlib.sha256(vendor.joinpath(name).read_bytes()).hexdigest() == digest, name
    for licence, words in (("LICENSE-d3.txt", "Mike Bostock"), ("LICENSE-elkjs.md", "Eclipse Public License - v 2.0")):
        assert words in vendor.joinpath(licence).read_text()
    page = html_page(traced("plain_densenet"))
    for version in re.findall(r"\| (\d+\.\d+\.\d+) \|", vendor.joinpath("README.md").read_text()):
        assert version in page
