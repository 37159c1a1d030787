"""The tree: what a model is made of, equal blocks collapsed, and how much of it each part is.

Numbers of a collapsed line are those of all its copies together, so that every column adds up to the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from torch import fx

from ..ir.cost import cost
from ..ir.program import Program
from .console import count, short, size
from .describe import describe_all, op_text, type_text
from .sites import Part, collapse, common_origin, find_parts, join_origins
from .sizes import sizes_text, with_defaults

_STYLES = {
    "block": "bold",
    "group": "bold",
    "stream": "bold",
    "attention": "cyan",
    "mlp": "green",
    "conv": "magenta",
    "mixer": "yellow",
}
_COLUMNS = ("", "operators", "parameters", "share", "MACs", "made of", "from")
_TEXT_COLUMNS = 2
_GAP = 2
_BAR_WIDTH = 10
_DETAIL_WIDTH = 76
_LEAST_WIDTH = 12


@dataclass
class _Amounts:
    nodes: int = 0
    params: int = 0
    macs: int = 0


class _Ledger:
    """Operators, parameters and MACs of any set of operators; a weight counts where it is read first."""

    def __init__(self, program: Program, sizes: dict[str, int]) -> None:
        self.cost = cost(program).at(**sizes)
        self.by_name = {item.node: item for item in self.cost.nodes}

    def of(self, nodes: Iterable[fx.Node]) -> _Amounts:
        """The sums over operators."""
        total = _Amounts()
        for node in nodes:
            total.nodes += 1
            if node.name in self.by_name:
                total.params += self.by_name[node.name].params
                total.macs += self.by_name[node.name].macs
        return total


def tree(program: Program, title: str, sizes: dict[str, int]) -> RenderableType:
    """The tree of a program's main graph.

    Args:
        program: the program.
        title: its first line.
        sizes: sizes of dynamic dimensions; others take those of the traced example.
    """
    sizes = with_defaults(sizes, program)
    ledger = _Ledger(program, sizes)
    parts = collapse(find_parts(program))
    rows = _Rows([])
    whole = ledger.of(node for part in parts for node in part.all_nodes())
    _add_rows(rows, parts, "", ledger, max(program.parameter_count, 1))
    total = (Text("whole", style="bold"), f"{whole.nodes:,}", short(whole.params), "", short(whole.macs), "", "")
    rows.cells.append(total)
    peak = ledger.cost.peak_activation_bytes
    return Group(_header(program, title, sizes, peak), Text(""), rows, *_footnotes(program, parts, ledger))


@dataclass
class _Rows:
    """The lines of the tree. On a narrow terminal the numbers stay, and the columns of text shrink, then go."""

    cells: list[tuple[Text | str, ...]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = list(zip(_COLUMNS, *self.cells, strict=True))
        widths = [max(cell_len(str(cell)) for cell in column) for column in columns]
        left = options.max_width - sum(width + _GAP for width in widths[:-_TEXT_COLUMNS])
        widths[0] = max(widths[0] + min(left, 0), _LEAST_WIDTH)
        # What a part is made of comes before where it is from.
        widths[-2] = min(widths[-2], _DETAIL_WIDTH, left)
        widths[-1] = min(widths[-1], left - widths[-2] - _GAP)
        shown = [n for n, width in enumerate(widths) if n < len(columns) - _TEXT_COLUMNS or width >= _LEAST_WIDTH]
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
        for n in shown:
            right = _COLUMNS[n] in ("operators", "parameters", "MACs")
            style = "dim" if _COLUMNS[n] == "from" else None
            table.add_column(
                _COLUMNS[n], justify="right" if right else "left", no_wrap=True, width=widths[n], style=style
            )
        for row in self.cells:
            table.add_row(*(row[n] for n in shown))
        yield table


def _header(program: Program, title: str, sizes: dict[str, int], peak: int) -> Text:
    dims = program.main.dims
    entry = program.main
    inputs = ", ".join(
        f"{n} {type_text(p.meta.get('val'), dims)}" for n, p in zip(entry.inputs, entry.placeholders, strict=True)
    )
    values = zip(entry.outputs, entry.output_values, strict=True)
    outputs = ", ".join(f"{n} {type_text(v.meta.get('val') if isinstance(v, fx.Node) else v, dims)}" for n, v in values)
    text = Text(title, style="bold")
    text.append(f"\n{inputs} -> {outputs}", style="not bold")
    weights = f"{count(program.parameter_count)} parameters in {size(program.weight_nbytes)}"
    at = f", all at {sizes_text(sizes)}" if sizes else ""
    text.append(f"\n{weights}; {size(peak)} of activations at the peak{at}", style="not bold")
    if program.history:
        text.append(f"\nafter {', '.join(program.history)}", style="not bold")
    return text


def _add_rows(rows: _Rows, parts: Sequence[Part], indent: str, ledger: _Ledger, whole: int) -> None:
    for position, part in enumerate(parts):
        last = position == len(parts) - 1 and indent != ""
        guide, below = ("└─ ", "   ") if last else ("├─ ", "│  ")
        label = Text(indent + guide, style="dim")
        if part.times > 1:
            label.append(f"{part.times} x ", style="not dim bold")
        label.append(_label(part), style=f"not dim {_STYLES.get(part.kind, '')}")
        amounts = ledger.of(_with_copies(part))
        cells = (
            label,
            f"{amounts.nodes:,}",
            short(amounts.params) if amounts.params else "-",
            _bar(amounts.params / whole),
            short(amounts.macs) if amounts.macs else "-",
            describe_all(part.own) if not part.children else _each(part, ledger),
            _origins(part),
        )
        rows.cells.append(cells)
        _add_rows(rows, _children(part), indent + below, ledger, whole)


def _children(part: Part) -> list[Part]:
    """A part's children, each with its counterparts in the part's copies, and its leftovers as one more."""
    children: list[Part] = []
    left = "sum" if {op_text(node) for node in part.own} == {"add"} else "between"
    for number, child in enumerate(part.children):
        twins = [copy.children[number] for copy in part.copies if number < len(copy.children)]
        children.append(_Twins.of(child, twins))
    if part.own and part.children:
        rest = Part(left, "rest", own=part.own)
        children.append(_Twins.of(rest, [Part(left, "rest", own=copy.own) for copy in part.copies]))
    return children


class _Twins(Part):
    """A part shown once for equal parts inside several copies of its parent."""

    twins: list[Part]

    @classmethod
    def of(cls, part: Part, twins: list[Part]) -> _Twins:
        made = cls(part.label, part.kind, part.own, part.children, part.signature, part.copies)
        made.twins = twins
        return made


def _with_copies(part: Part) -> Iterable[fx.Node]:
    yield from part.all_nodes()
    for twin in getattr(part, "twins", ()):
        yield from twin.all_nodes()


def _label(part: Part) -> str:
    if part.kind == "block":
        return f"block [{', '.join(child.label for child in part.children)}]"
    if part.kind == "group":
        return "group of " + ", ".join(_label(child) for child in part.children)
    return part.label


def _each(part: Part, ledger: _Ledger) -> str:
    return f"{short(ledger.of(part.nodes()).params)} parameters each" if part.times > 1 else ""


def _origins(part: Part) -> str:
    every = [part, *part.copies, *getattr(part, "twins", ())]
    found = [common_origin(one.nodes()) for one in every]
    return join_origins(found) if all(found) else found[0]


def _bar(share: float) -> str:
    filled = share * _BAR_WIDTH
    eighths = round((filled - int(filled)) * 8)
    bar = "█" * int(filled) + (" ▏▎▍▌▋▊▉█"[eighths] if eighths else "")
    return f"{bar:<{_BAR_WIDTH}} {share:>4.0%}" if share else ""


def _footnotes(program: Program, parts: Sequence[Part], ledger: _Ledger) -> list[Text]:
    lines: list[str] = []
    readers = {n: sum(u.op == "call_function" for u in n.users) for n in program.graph.find_nodes(op="get_attr")}
    shared = [str(n.target) for n, times in readers.items() if times > 1 and n.meta["val"].dim() > 1]
    if shared:
        shown = ", ".join(shared[:3]) + (f" and {len(shared) - 3} more" if len(shared) > 3 else "")
        lines.append(f"read more than once, counted where read first: {shown}")
    if ledger.cost.unknown:
        lines.append("MACs unknown, counted as 0: " + ", ".join(f"{n} x {op}" for op, n in ledger.cost.unknown.items()))
    if program.subgraphs:
        lines.append(f"nested graphs (control flow), counted where they are run: {', '.join(program.subgraphs)}")
    if all(part.kind in ("module", "rest") for part in parts):
        lines.append("no residual stream found: shown by module")
    return [Text(line, style="dim") for line in lines]
