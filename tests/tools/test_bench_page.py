"""The suite ``page`` measures pages that hold every operator, and says when one does not."""

from __future__ import annotations

import pytest

from graphlathe.ir.errors import GraphlatheError
from graphlathe.tools.bench import base, page
from graphlathe.tools.bench.base import Run
from graphlathe.tools.html.page import html_page
from tests.zoo_programs import traced


@pytest.mark.slow
def test_quick_run() -> None:
    result = base.get("page").run(Run(quick=True))
    small, large = result.rows
    assert small["operators"] * 3 < large["operators"]
    for row in result.rows:
        assert 0 < row["one_bytes"] < row["two_bytes"]
    assert len(result.goals) == 2


def test_a_page_without_an_operator_is_noticed() -> None:
    program = traced("plain_resnet")
    whole = html_page(program)
    page._check(program, whole)
    smaller = program.clone()
    for node in reversed(smaller.graph.nodes):
        if node.op == "call_function":
            node.replace_all_uses_with(node.all_input_nodes[0])
            smaller.graph.erase_node(node)
            break
    with pytest.raises(GraphlatheError, match="nodes"):
        page._check(program, html_page(smaller))
