"""The exceptions of graphlathe.

Every message says what is wrong, where (pass, node, origin), what was expected, and what to do. The command line
prints the message alone and exits with code 2; ``--debug`` adds the traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class GraphlatheError(Exception):
    """Base of all errors that graphlathe raises on purpose.

    Args:
        message: what is wrong, in one sentence.
        pass_name: the pass that was running, if any.
        node: the node's name in the graph, if one is to blame.
        origin: where that node came from (module path or ONNX node name).
        expected: what was expected instead.
        remedy: what the user can do.
    """

    def __init__(
        self,
        message: str,
        *,
        pass_name: str | None = None,
        node: str | None = None,
        origin: str | None = None,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.message = message
        self.pass_name = pass_name
        self.node = node
        self.origin = origin
        self.expected = expected
        self.remedy = remedy
        super().__init__(self._render())

    def _render(self) -> str:
        prefix = f"{self.pass_name}: " if self.pass_name else ""
        place = ""
        if self.node:
            place = f" (node %{self.node}" + (f", from {self.origin})" if self.origin else ")")
        parts = [f"{prefix}{self.message}{place}"]
        if self.expected:
            parts.append(f"expected: {self.expected}")
        if self.remedy:
            parts.append(f"what to do: {self.remedy}")
        return "\n  ".join(parts)

    def __str__(self) -> str:
        return self._render()


class PipelineError(GraphlatheError):
    """A pipeline string, a pass name or a pass option is wrong."""


class PreconditionError(GraphlatheError):
    """A pass makes no sense for this program, or lacks something that it needs."""


class PostconditionError(GraphlatheError):
    """A pass broke its own promise (its effect, or its own law)."""


class VerifyError(GraphlatheError):
    """A program is not well formed, or differs from its reference."""


class UnsupportedOpError(GraphlatheError):
    """An operator has no rule, translation or kernel where one is needed."""


class ExportError(GraphlatheError):
    """A program could not be written."""


class ImportModelError(GraphlatheError):
    """A model could not be read or traced."""


class MissingOperatorError(ImportModelError, UnsupportedOpError):
    """A file holds an operator, or a form of one, that cannot be imported."""


class DataDependentError(ImportModelError):
    """A shape, axis or count is computed from data.

    Attributes:
        inputs: the model's inputs that the numbers come from; `from_onnx` can fix them (``values=``).
    """

    def __init__(self, message: str, *, inputs: Sequence[str] = (), **where: str | None) -> None:
        self.inputs = tuple(inputs)
        super().__init__(message, **where)


class InputError(GraphlatheError):
    """A call got inputs that the program's signature excludes (name, dtype, shape, size guard)."""


def suggest(name: str, known: Sequence[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest known name, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
