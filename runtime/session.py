"""What every back end's session has in common: names, checks, and state that is carried from call to call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from ..ir.calling import match_call
from ..ir.errors import GraphlatheError, InputError, suggest
from ..ir.program import Entry, Outputs, Program, StatePair


def as_tensor(value: Any) -> Any:
    """An array as a tensor over the same memory (read-only arrays are copied); anything else as it is."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    return value


class Session(ABC):
    """A program, compiled. Close it, or use it as a context manager, to free what it holds.

    Attributes:
        inputs, outputs: names in order.
        state: the outputs that feed an input at the next call; the session feeds them unless the caller does.
    """

    def __init__(self, inputs: Sequence[str], outputs: Sequence[str], state: Sequence[StatePair] = ()) -> None:
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.state = tuple(state)
        self._carried: dict[str, torch.Tensor] = {}
        self._closed = False

    @abstractmethod
    def _check(self, feeds: Mapping[str, Any]) -> dict[str, int]:
        """Check dtypes, shapes and sizes; returns the sizes of the named dimensions."""

    @abstractmethod
    def _execute(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Compute the outputs, by name."""

    @abstractmethod
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run on positional and keyword inputs."""

    def _initial(self, pair: StatePair) -> torch.Tensor | None:
        """A state's first value, if it is known."""
        return None

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Compute all outputs.

        Args:
            feeds: a tensor or array for each input. State inputs may be left out: they take what the call before
                returned, or their first value.

        Returns:
            The outputs by name, as tensors.

        Raises:
            InputError: an input is missing or unknown, or outside the signature (dtype, shape, size guards).
            GraphlatheError: the session is closed, or the back end failed.
        """
        if self._closed:
            raise GraphlatheError("the session is closed", remedy="compile the program again")
        given = {name: as_tensor(value) for name, value in feeds.items()}
        for name in given:
            if name not in self.inputs:
                raise InputError(
                    f"unknown input '{name}'{suggest(name, self.inputs)}", expected=f"inputs: {', '.join(self.inputs)}"
                )
        for pair in self.state:
            if pair.input not in given:
                value = self._carried.get(pair.input)
                value = self._initial(pair) if value is None else value
                if value is not None:
                    given[pair.input] = value
        missing = [name for name in self.inputs if name not in given]
        if missing:
            raise InputError(
                f"missing input {', '.join(map(repr, missing))}", expected=f"inputs: {', '.join(self.inputs)}"
            )
        sizes = self._check(given)
        results = self._execute({name: given[name] for name in self.inputs}, sizes)
        for pair in self.state:
            self._carried[pair.input] = results[pair.output]
        return results

    def reset(self) -> None:
        """Forget the carried state: the next call starts from the first values."""
        self._carried.clear()

    def close(self) -> None:
        """Free what the session holds; closing twice is allowed."""
        self._carried.clear()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ProgramSession(Session):
    """A session that knows its program, and is called as the program is.

    Args:
        program: the program.
        entry: which entry.
    """

    def __init__(self, program: Program, entry: str) -> None:
        self.program = program
        self.entry_name = entry
        self.entry: Entry = program.entries[entry]
        kept = [n for n, v in zip(self.entry.outputs, self.entry.output_values, strict=True) if v is not None]
        super().__init__(self.entry.inputs, kept, self.entry.state)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run on the traced callable's own arguments; returns the one tensor, or named `Outputs`, as it did."""
        results = self.run(match_call(self.entry, args, kwargs))
        return next(iter(results.values())) if self.entry.bare_output else Outputs(results)

    def _check(self, feeds: Mapping[str, Any]) -> dict[str, int]:
        return self.program.check_feeds(feeds, self.entry_name)

    def _initial(self, pair: StatePair) -> torch.Tensor | None:
        return None if pair.initial is None else self.program.weights[pair.initial].tensor()

    def output_shape(self, name: str, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
        """An output's shape at given sizes; None when it depends on data, or the output is no tensor."""
        value = self.entry.output_values[self.entry.outputs.index(name)]
        value = getattr(value, "meta", {}).get("val")
        if not isinstance(value, torch.Tensor):
            return None
        known = {dim.symbol for dim in self.entry.dims.by_name.values()}
        symbols = {s for size in value.shape if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}
        return tuple(self.entry.dims.evaluate(s, sizes) for s in value.shape) if symbols <= known else None

    def output_dtype(self, name: str) -> torch.dtype | None:
        """An output's element type; None when it is no tensor."""
        value = self.entry.output_values[self.entry.outputs.index(name)]
        value = getattr(value, "meta", {}).get("val")
        return value.dtype if isinstance(value, torch.Tensor) else None
