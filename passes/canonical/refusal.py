"""How a recogniser says that a place only looks like its pattern."""

from __future__ import annotations

from torch import fx


class Refused(Exception):
    """A place looks like a pattern and is not one. Caught by the pass that asked, which counts the reason.

    Args:
        reason: why not; the same text for the same reason, so that reasons can be counted.
        node: the node that is to blame.
    """

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


class NoAttention(Exception):
    """Why a softmax is no attention that can be raised; the text is the reason."""


def readers_inside(inside: set[fx.Node], results: set[fx.Node]) -> None:
    """Check that what a rewrite makes superfluous is read by nothing else.

    Args:
        inside: the nodes between the pattern's operands and its results.
        results: the nodes that are replaced.

    Raises:
        Refused: a node inside has another reader, so that it would be computed all the same.
    """
    for node in inside:
        if any(user not in inside and user not in results for user in node.users):
            operation = str(node.target).removeprefix("aten.").partition(".")[0]
            raise Refused(f"the result of '{operation}' inside is read elsewhere too", node)
