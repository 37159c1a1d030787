"""What every back end's session offers: named inputs and outputs, a checked signature, state that it keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import fx

from ..ir.errors import InputError, suggest
from ..ir.program import Outputs, Program


class Session(ABC):
    """A model that is ready to run.

    Attributes:
        inputs: the inputs' names, in order.
        outputs: the outputs' names, in order.
        state: the values that the session carries from one run to the next, by input name.
    """

    def __init__(self, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.state: dict[str, torch.Tensor] = {}

    @abstractmethod
    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run on named inputs (torch or numpy) and return named outputs (torch).

        Raises:
            InputError: the inputs do not fit the signature.
        """

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the traced model's own arguments; returns what the program would."""

    def reset(self) -> None:
        """Forget the state that runs have left, and start again from the initial values."""
        self.state.clear()

    @abstractmethod
    def close(self) -> None:
        """Free what the session holds; it cannot run afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ProgramSession(Session):
    """A session of a program's entry: checks what `Program.run` checks, then lets a back end compute.

    Args:
        program: the program; it is not changed, and must not change while the session lives.
        entry: which entry.
    """

    def __init__(self, program: Program, entry: str = "main") -> None:
        self.program = program
        self.entry_name = entry
        self.entry = program.entries[entry]
        super().__init__(self.entry.inputs, self.entry.outputs)
        self.constants = {
            name: value
            for name, value in zip(self.entry.outputs, self.entry.output_values, strict=True)
            if not isinstance(value, fx.Node)
        }

    @abstractmethod
    def compute(self, feeds: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Compute the outputs that are no constants, from checked inputs at known sizes of the named dimensions."""

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """See `Session.run`; state inputs that are not given take what the last run left."""
        unknown = [name for name in feeds if name not in self.inputs]
        if unknown:
            raise InputError(
                f"unknown input '{unknown[0]}'{suggest(unknown[0], self.inputs)}",
                expected=f"inputs: {', '.join(self.inputs)}",
            )
        given = {name: as_tensor(value) for name, value in feeds.items()}
        for pair in self.entry.state:
            if pair.input in given:
                continue
            if pair.input in self.state:
                given[pair.input] = self.state[pair.input]
            elif pair.initial is not None:
                given[pair.input] = self.program.weights[pair.initial].tensor()
        missing = [name for name in self.inputs if name not in given]
        if missing:
            raise InputError(
                f"missing input {', '.join(repr(m) for m in missing)}", expected=f"inputs: {', '.join(self.inputs)}"
            )
        sizes = self.program.check_feeds(given, self.entry_name)
        computed = {**self.compute(given, sizes), **self.constants}
        for pair in self.entry.state:
            self.state[pair.input] = computed[pair.output]
        return {name: computed[name] for name in self.outputs}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the traced model's own arguments; returns the one tensor or named `Outputs`, as the program does."""
        held = {pair.input: self.state[pair.input] for pair in self.entry.state if pair.input in self.state}
        given = {name: value for name, value in held.items() if name not in kwargs}
        feeds = self.program.feeds(*args, entry=self.entry_name, **kwargs, **given)
        values = self.run(feeds)
        return next(iter(values.values())) if self.entry.bare_output else Outputs(values)


def as_tensor(value: Any) -> torch.Tensor:
    """A torch view of a numpy array; tensors as they are.

    Raises:
        InputError: neither of the two.
    """
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        # PyTorch has no read-only tensors; nothing here writes into inputs, but a shared one would say so.
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    raise InputError(f"an input is a {type(value).__name__}", expected="a torch tensor or a numpy array")
