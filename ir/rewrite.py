"""The rewriter: the only way to create, replace or erase nodes.

It infers ``meta["val"]``, copies the origin, stamps the pass that made a node, and counts mutations, so that
'modified' is measured, not claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .errors import GraphlatheError, VerifyError
from .infer import Inference, fake_weight, infer
from .program import MADE_BY, ORIGIN, Entry, Program
from .weights import Weight

Target = Callable[..., Any]


class Rewriter:
    """Creates, replaces and erases nodes of one graph of a program.

    Args:
        program: the program to change, in place.
        made_by: the pass's name, stamped on new nodes.
        entry: the entry (or nested graph) to work on.

    Attributes:
        mutations: how many changes were made.
    """

    def __init__(self, program: Program, made_by: str, entry: str = "main") -> None:
        self.program = program
        self.made_by = made_by
        self.entry_name = entry
        if entry not in program.graphs:
            raise VerifyError(f"no graph '{entry}'", pass_name=made_by, expected=f"one of {', '.join(program.graphs)}")
        self.graph: fx.Graph = program.graphs[entry]
        self.mutations = 0
        self._inference = Inference(program, common=program.inferred)
        self._weights: dict[str, fx.Node] | None = None
        self._foreign = 0  # mutations of the program by others, when the weights' nodes were looked up

    def _mutated(self, kind: str, node: fx.Node) -> None:
        """Count one change: ``create``, ``replace``, ``change`` (of arguments), ``erase`` or ``weight``."""
        self.mutations += 1
        self.program.mutations += 1
        for listener in self.program.listeners:
            listener(self.made_by, kind, node)

    @property
    def entry(self) -> Entry:
        """The entry under rewriting (only for entries, not for nested graphs)."""
        return self.program.entries[self.entry_name]

    @contextmanager
    def before(self, node: fx.Node) -> Generator[None]:
        """New nodes go before ``node``."""
        with self.graph.inserting_before(node):
            yield

    @contextmanager
    def after(self, node: fx.Node) -> Generator[None]:
        """New nodes go after ``node``."""
        with self.graph.inserting_after(node):
            yield

    def call(
        self,
        target: Target,
        *args: Any,
        like: fx.Node | None = None,
        same_value: bool = False,
        **kwargs: Any,
    ) -> fx.Node:
        """Create an operator node at the insertion point, and infer its value.

        Args:
            target: the operator (an ``OpOverload``, or a Python function on symbolic sizes).
            args, kwargs: its arguments; nodes stand for values.
            like: the node whose origin the new one takes.
            same_value: take over the value (shape, dtype) of ``like`` instead of inferring it.

        Raises:
            VerifyError: the operator refuses arguments of these shapes and dtypes.
        """
        node = self.graph.call_function(target, args, kwargs)
        try:
            node.meta["val"] = like.meta["val"] if same_value and like is not None else self._inference.value(node)
        except GraphlatheError:
            self.graph.erase_node(node)  # a refused attempt leaves nothing behind
            raise
        node.meta[MADE_BY] = self.made_by
        source = like or next((a for a in node.all_input_nodes if a.meta.get(ORIGIN)), None)
        if source is not None and source.meta.get(ORIGIN):
            node.meta[ORIGIN] = source.meta[ORIGIN]
        self._mutated("create", node)
        return node

    def weight(self, name: str, weight: Weight | None = None) -> fx.Node:
        """The node of the weight ``name``; with ``weight``, the program's weight of that name is set first.

        A new node goes to the top of the graph, so that it may be used anywhere.
        """
        known = self._weight_nodes()
        old = self.program.weights.get(name)
        changed = weight is not None and old is not weight
        if weight is not None:
            self.program.weights[name] = weight
        elif name not in self.program.weights:
            raise VerifyError(f"no weight '{name}' in the program", pass_name=self.made_by)
        node = known.get(name)
        if node is None:
            anchor = next(n for n in self.graph.nodes if n.op != "placeholder")
            with self.graph.inserting_before(anchor):
                node = self.graph.create_node("get_attr", name)
            node.meta[ORIGIN] = name.rpartition(".")[0]
            node.meta[MADE_BY] = self.made_by
            node.meta["val"] = fake_weight(self.program, self.program.weights[name])
            known[name] = node
            self._mutated("create", node)
        if changed:
            self._set_type(name, old)
            self._mutated("weight", node)
        return node

    def _weight_nodes(self) -> dict[str, fx.Node]:
        """This graph's weight nodes by name, looked up again when somebody else has changed the program."""
        foreign = self.program.mutations - self.mutations
        if self._weights is None or foreign != self._foreign:
            self._weights = {str(n.target): n for n in self.graph.find_nodes(op="get_attr")}
            self._foreign = foreign
        return self._weights

    def _set_type(self, name: str, old: Weight | None) -> None:
        """Give every node that reads a changed weight its new type, in all graphs."""
        new = self.program.weights[name]
        if old is not None and (old.shape, old.dtype) == (new.shape, new.dtype):
            return
        for graph in self.program.graphs.values():
            for node in graph.find_nodes(op="get_attr"):
                if node.target == name:
                    node.meta["val"] = fake_weight(self.program, new)

    def fresh_weight_name(self, base: str) -> str:
        """A weight name that is not taken: ``base``, or ``base_2``, ``base_3``..."""
        name, count = base, 1
        while name in self.program.weights:
            count += 1
            name = f"{base}_{count}"
        return name

    def replace(self, node: fx.Node, new: fx.Node, *, erase: bool = True) -> None:
        """Let every user of ``node`` use ``new`` instead, and erase ``node`` if nothing needs it any more.

        What ``new`` itself is computed from keeps reading ``node``: a value may be replaced by a function of it.

        Raises:
            VerifyError: the two values differ in dtype or rank, or ``new`` is computed after a user of ``node``.
        """
        check_same_type(node, new, self.made_by)
        if not new.meta.get(ORIGIN) and node.meta.get(ORIGIN):
            new.meta[ORIGIN] = node.meta[ORIGIN]
        kept = _between(node, new)
        users = [u for u in node.users if u not in kept]
        for user in users:
            if user < new:
                raise VerifyError(
                    f"%{new.name} cannot stand for it: its user %{user.name} comes before that",
                    pass_name=self.made_by,
                    node=node.name,
                    origin=node.meta.get(ORIGIN),
                    remedy="create the new value before the first user",
                )
        for user in users:
            user.replace_input_with(node, new)
        self._mutated("replace", node)
        if erase and not node.users:
            self.erase(node)

    def replace_with_number(self, node: fx.Node, number: float) -> None:
        """Write a number (also a truth value) where ``node`` was read, and erase ``node``."""
        for user in list(node.users):
            user.args = map_arg(user.args, lambda a: number if a is node else a)
            user.kwargs = map_arg(user.kwargs, lambda a: number if a is node else a)
        self._mutated("replace", node)
        self.erase(node)

    def replace_in(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let one user read ``new`` where it read ``old``."""
        check_same_type(old, new, self.made_by)
        user.replace_input_with(old, new)
        self._mutated("replace", user)

    def set_args(
        self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any] | None = None, target: Target | None = None
    ) -> None:
        """Give a node other arguments and infer its value again; the types of its users are not inferred again.

        Args:
            node: the node to change.
            args, kwargs: its new arguments; without ``kwargs`` the old ones stay.
            target: another operator for it (a ``reshape`` for a ``view``).

        Raises:
            VerifyError: the operator refuses them; the node keeps its old ones then.
        """
        old = node.args, node.kwargs, node.target
        node.args = tuple(args)
        if kwargs is not None:
            node.kwargs = kwargs
        if target is not None:
            node.target = target
        try:
            node.meta["val"] = self._inference.value(node)
        except GraphlatheError:
            node.args, node.kwargs, node.target = old
            raise
        self._mutated("change", node)

    def add_output(self, name: str, node: fx.Node) -> None:
        """Return one more value; a call of the program then gives named outputs.

        Raises:
            VerifyError: the name is taken.
        """
        entry = self.entry
        if name in entry.outputs:
            raise VerifyError(f"there is an output '{name}' already", pass_name=self.made_by, node=node.name)
        output = entry.output_node
        output.args = ((*entry.output_values, node),)
        entry.outputs = (*entry.outputs, name)
        entry.bare_output = False
        self._mutated("change", output)

    def erase(self, node: fx.Node) -> None:
        """Erase a node that nothing uses.

        Raises:
            VerifyError: something uses it.
        """
        if node.users:
            user = next(iter(node.users))
            raise VerifyError(
                f"cannot erase a value that %{user.name} uses",
                pass_name=self.made_by,
                node=node.name,
                origin=node.meta.get(ORIGIN),
            )
        self.graph.erase_node(node)
        if self._weights is not None and node.op == "get_attr":
            self._weights.pop(str(node.target), None)
        self._mutated("erase", node)

    def erase_dead(self) -> int:
        """Erase every node that no output needs, in one backward walk; returns how many."""
        erased = 0
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output") and not has_effect(node):
                self.erase(node)
                erased += 1
        return erased


def _between(node: fx.Node, new: fx.Node) -> set[fx.Node]:
    """``new`` and what it is computed from, as far as that comes after ``node``."""
    found = {new}
    stack = [new] if node < new else []
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in found and node < operand:
                found.add(operand)
                stack.append(operand)
    return found


def has_effect(node: fx.Node) -> bool:
    """Whether a node must be kept although nothing reads it (an assertion on data, a mutation)."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable or (
            target.namespace == "aten" and target._opname in ("_assert_async", "_assert_scalar")
        )
    return False


# What makes a random operator compute the same thing every time.
_QUIET: dict[str, tuple[Any, ...]] = {"dropout_p": (0,), "dropout": (0,), "train": (False,), "training": (False,)}


def is_random(node: fx.Node) -> bool:
    """Whether two runs of a node on equal inputs may differ. Attention without dropout, say, is not random."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    for index, parameter in enumerate(target._schema.arguments):
        if parameter.name in _QUIET:
            default = parameter.default_value if parameter.has_default_value() else None
            value = node.args[index] if index < len(node.args) else node.kwargs.get(parameter.name, default)
            if not isinstance(value, fx.Node) and value in _QUIET[parameter.name]:
                return False
    return True


def check_same_type(old: fx.Node, new: fx.Node, pass_name: str) -> None:
    """Check that one value may stand for another: same dtype, rank, and sizes where both are plain numbers."""
    a, b = old.meta.get("val"), new.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return
    sizes_differ = any(
        isinstance(x, int) and isinstance(y, int) and x != y for x, y in zip(a.shape, b.shape, strict=False)
    )
    if a.dtype != b.dtype or a.dim() != b.dim() or sizes_differ:
        raise VerifyError(
            f"%{new.name} ({b.dtype} {list(b.shape)}) cannot stand for it",
            pass_name=pass_name,
            node=old.name,
            origin=old.meta.get(ORIGIN),
            expected=f"{a.dtype} {list(a.shape)}",
        )


def is_op(node: Any, *targets: Any) -> bool:
    """Whether ``node`` calls one of the given operators (an overload, or all overloads of a packet)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return any(
        node.target is t
        or (isinstance(t, torch._ops.OpOverloadPacket) and getattr(node.target, "overloadpacket", None) is t)
        for t in targets
    )


__all__ = [
    "Rewriter",
    "check_same_type",
    "fake_weight",
    "has_effect",
    "infer",
    "is_op",
    "is_random",
]
