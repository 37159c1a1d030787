"""What `dump` prints: every operator is somewhere, equal blocks are one line, numbers add up."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from graphlathe.ir.cost import cost
from graphlathe.ir.errors import InputError
from graphlathe.ir.from_torch import trace
from graphlathe.ir.program import Program
from graphlathe.ir.structure import structure
from graphlathe.passes.base import Context
from graphlathe.passes.layers.drop_layers import DropLayers
from graphlathe.tools.dump import DumpOptions, render, to_text
from graphlathe.tools.dump_table import cost_table
from graphlathe.tools.sites import find_parts, is_operator
from graphlathe.tools.sizes import parse_sizes
from tests.zoo_programs import traced

# A decoder, an encoder-decoder, a CNN with unequal blocks, and two without a residual stream.
MODELS = ("llama", "t5", "resnet", "plain_densenet", "plain_lstm")


def dumped(program: Program, format: str, **options: object) -> str:
    return to_text(render(program, DumpOptions(format, **options), "model"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
class TestEveryOperatorIsShownOnce:
    def test_in_the_parts(self, name: str) -> None:
        program = traced(name)
        shown = Counter(node.name for part in find_parts(program) for node in part.all_nodes())
        assert shown == Counter(node.name for node in program.graph.nodes if is_operator(node))

    def test_in_the_tree(self, name: str) -> None:
        program = traced(name)
        lines = dumped(program, "tree").splitlines()
        whole = next(line for line in lines if line.startswith("whole"))
        operators = sum(is_operator(node) for node in program.graph.nodes)
        assert int(whole.split()[1].replace(",", "")) == operators
        top = [line for line in lines if re.match(r"[├└]─ ", line)]
        assert sum(int(re.search(r"  +([\d,]+)  ", line).group(1).replace(",", "")) for line in top) == operators  # type: ignore[union-attr]

    @pytest.mark.parametrize("by", ["node", "site", "origin"])
    def test_in_the_table(self, name: str, by: str) -> None:
        program = traced(name)
        total = cost(program).at()
        table = cost_table(program, "model", by=by, sizes={n: d.hint for n, d in program.main.dims.by_name.items()})
        macs = [str(cell).replace(",", "") for cell in table.columns[2].cells]
        assert int(macs[-1]) == total.macs == sum(map(int, macs[:-1]))

    def test_in_the_dot_text(self, name: str) -> None:
        program = traced(name)
        text = dumped(program, "dot")
        declared = Counter(re.findall(r'^\s*"([^"]+)" \[label=', text, re.MULTILINE))
        assert all(declared[node.name] == 1 for node in program.graph.nodes if is_operator(node))
        assert text.count("{") == text.count("}")
        edges = re.findall(r'^  "([^"]+)" -> "([^"]+)";$', text, re.MULTILINE)
        assert all(a in declared and b in declared for a, b in edges), "Graphviz would invent a node"


class TestTree:
    def test_equal_layers_are_one_line(self) -> None:
        text = dumped(traced("llama"), "tree")
        assert re.search(r"├─ 3 x block \[attention, mlp\] .*model\.layers\.0-2", text)
        assert "linear 32->16 x2" in text and "4 heads of 8 (2 key-value)" in text

    def test_after_dropping_a_layer_it_says_which_are_left(self) -> None:
        program = traced("llama").clone()
        DropLayers(indices=(1,)).run(program, Context())
        text = dumped(program, "tree")
        assert re.search(r"2 x block \[attention, mlp\] .*model\.layers\.\{0,2\}", text)

    def test_a_stream_for_each_stack(self) -> None:
        text = dumped(traced("t5"), "tree")
        assert "3 x block [attention, mlp]" in text
        assert "2 x block [attention, cross-attention, mlp]" in text

    def test_unequal_blocks_are_not_collapsed(self) -> None:
        text = dumped(traced("resnet"), "tree")
        assert "2 x block" in text and text.count("─ block [conv") == 2

    def test_without_a_stream_it_says_so(self) -> None:
        assert "no residual stream found: shown by module" in dumped(traced("plain_densenet"), "tree")

    def test_tied_weights_count_once_and_are_named(self) -> None:
        program = traced("gpt2")
        text = dumped(program, "tree")
        assert "read more than once" in text
        assert f"{program.parameter_count:,} parameters" in text

    def test_sizes_change_the_macs(self) -> None:
        program = traced("llama")
        small, large = (dumped(program, "tree", sizes=[f"B=1,S={s}"]).splitlines() for s in (8, 64))
        assert "at B=1, S=8" in small[2] and "at B=1, S=64" in large[2]
        assert [x for x in small if x.startswith("whole")] != [x for x in large if x.startswith("whole")]


class TestTable:
    def test_symbolic_without_sizes(self) -> None:
        text = dumped(traced("llama"), "table")
        assert "in B, S" in text and re.search(r"B\*S|S\*B", text)

    def test_sorted_by_macs(self) -> None:
        table = cost_table(traced("llama"), "m", sort="macs", sizes={"B": 1, "S": 16})
        macs = [int(str(cell).replace(",", "")) for cell in table.columns[2].cells][:-1]
        assert macs == sorted(macs, reverse=True) and macs[0] > macs[-1]

    @pytest.mark.parametrize("key", ["bytes", "params"])
    def test_sorted_by(self, key: str) -> None:
        column = {"bytes": 3, "params": 4}[key]
        table = cost_table(traced("resnet"), "m", sort=key, sizes={"B": 1, "H": 64, "W": 64})
        numbers = [int(str(cell).replace(",", "")) for cell in table.columns[column].cells][:-1]
        assert numbers == sorted(numbers, reverse=True)

    def test_symbolic_rows_are_sorted_too(self) -> None:
        numeric = cost_table(traced("llama"), "m", sort="macs", sizes={"B": 2, "S": 12})
        symbolic = cost_table(traced("llama"), "m", sort="macs")
        assert list(numeric.columns[0].cells) == list(symbolic.columns[0].cells)

    def test_a_limit_sums_the_rest(self) -> None:
        sizes = {"B": 1, "S": 16}
        table = cost_table(traced("llama"), "m", sort="macs", limit=3, sizes=sizes)
        macs = [int(str(cell).replace(",", "")) for cell in table.columns[2].cells]
        assert len(macs) == 5 and sum(macs[:4]) == macs[4] == cost(traced("llama")).at(**sizes).macs
        assert str(list(table.columns[0].cells)[3]).endswith(" more")

    def test_sites_are_named_by_block_and_branch(self) -> None:
        text = dumped(traced("llama"), "table", by="site", sizes=["S=16"])
        assert "block 0 / attention" in text and "block 2 / mlp" in text


class TestSites:
    def test_every_site_and_what_is_none(self) -> None:
        text = dumped(traced("llama"), "sites")
        assert text == str(structure(traced("llama"))) + "\n"
        assert all(f"block {i} [attention, mlp]" in text for i in range(3))

    def test_every_entry(self) -> None:
        program = traced("llama").clone()
        program.entries["again"] = program.main.copy()
        text = dumped(program, "sites")
        assert text.count("stream 0") == 2
        assert text.startswith("@main\n")
        assert "\n@again\n" in text


class TestText:
    def test_is_the_canonical_text(self) -> None:
        program = traced("llama")
        assert dumped(program, "text").rstrip("\n") == program.to_text().rstrip("\n")

    def test_origins_on_request(self) -> None:
        program = traced("llama")
        assert "model.layers.0.mlp" in dumped(program, "text", origins=True)
        assert dumped(program, "text", origins=True) != dumped(program, "text")


class TestDot:
    def test_blocks_and_branches_are_clusters(self) -> None:
        text = dumped(traced("llama"), "dot")
        assert text.count('label="block ') == 3
        assert text.count('label="attention"') == 3 and text.count('label="mlp"') == 3

    def test_names_are_escaped(self) -> None:
        class Odd(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x.relu()

        program = trace(Odd(), (torch.zeros(2),))
        assert r'digraph "a \"b\" \\ c"' in to_text(render(program, DumpOptions("dot"), 'a "b" \\ c'))


class TestSizes:
    def test_names_and_lists(self) -> None:
        program = traced("llama")
        assert parse_sizes(["B=2,S=7"], program) == {"B": 2, "S": 7} == parse_sizes(["B=2", "S=7"], program)

    @pytest.mark.parametrize(
        ("text", "message"),
        [("S", "NAME=N"), ("S=", "NAME=N"), ("S=-3", "NAME=N"), ("T=3", "no dynamic dimension 'T'"), ("S=0", "from 1")],
    )
    def test_refuses(self, text: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            parse_sizes([text], traced("llama"))

    def test_a_model_without_dynamic_dimensions_says_so(self) -> None:
        program = trace(torch.nn.Linear(3, 2), (torch.zeros(1, 3),))
        with pytest.raises(InputError, match="all sizes of this model are fixed"):
            parse_sizes(["B=2"], program)
