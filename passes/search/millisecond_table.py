"""A file that keeps measured milliseconds, with what they are valid for."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...ir.errors import GraphlatheError
from ...ir.files import write_atomically
from ...ir.program import Program
from ...runtime.ort import import_onnxruntime
from ...runtime.session import as_tensor
from ...tools.bench.machine import cores, cpu_model

_FORMAT = "graphlathe milliseconds 1"


@dataclass(frozen=True)
class Setting:
    """What a measurement is valid for.

    Attributes:
        program: the fingerprint of the unchanged program.
        machine: its processor, and the cores that may be used.
        onnxruntime: its version.
        threads: threads within an operator.
        feeds: each input with its element type and sizes, sorted by name.
    """

    program: str
    machine: str
    onnxruntime: str
    threads: int
    feeds: tuple[tuple[str, str], ...]

    @classmethod
    def here(cls, program: Program, feeds: Mapping[str, Any], threads: int = 1) -> Setting:
        """The setting of this machine.

        Raises:
            GraphlatheError: onnxruntime is not installed.
        """
        tensors = {name: as_tensor(value) for name, value in feeds.items()}
        sizes = {n: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for n, t in tensors.items()}
        version = str(import_onnxruntime().__version__)
        machine = f"{cpu_model()}, {cores()} cores"
        return cls(program.fingerprint(), machine, version, threads, tuple(sorted(sizes.items())))


@dataclass
class MillisecondTable:
    """Measured milliseconds, kept in a JSON file so that nothing is measured twice.

    Attributes:
        baseline: milliseconds of the unchanged program.
        saved: milliseconds saved per site, by setting, by the key's text (`key_text`) and by the number of sites that
            were changed for the measurement.
    """

    baseline: dict[Setting, float] = field(default_factory=dict[Setting, float])
    saved: dict[tuple[Setting, str, int], float] = field(default_factory=dict[tuple[Setting, str, int], float])

    @classmethod
    def load(cls, path: Path) -> MillisecondTable:
        """Read a table; a file that does not exist is an empty one.

        Raises:
            GraphlatheError: the file is no such table.
        """
        table = cls()
        if not path.exists():
            return table
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(content["format"])
            for part in content["measured"]:
                raw = part["setting"]
                setting = Setting(
                    str(raw["program"]),
                    str(raw["machine"]),
                    str(raw["onnxruntime"]),
                    int(raw["threads"]),
                    tuple(sorted((str(n), str(s)) for n, s in raw["feeds"].items())),
                )
                table.baseline[setting] = float(part["baseline_ms"])
                for row in part["saved"]:
                    table.saved[setting, key_text(_tuples(row["key"])), int(row["sites"])] = float(row["ms"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise GraphlatheError(
                f"'{path}' is no table of milliseconds: {type(error).__name__}: {error}",
                expected=f"JSON of the format '{_FORMAT}'",
                remedy="delete the file to measure again, or name another",
            ) from error
        return table

    def save(self, path: Path) -> None:
        """Write the table; the file appears complete or not at all.

        Raises:
            ExportError: it cannot be written.
        """
        measured: list[dict[str, Any]] = []
        for setting, milliseconds in self.baseline.items():
            rows = [
                {"key": json.loads(text), "sites": sites, "ms": ms}
                for (where, text, sites), ms in self.saved.items()
                if where == setting
            ]
            head = {**asdict(setting), "feeds": dict(setting.feeds)}
            measured.append({"setting": head, "baseline_ms": milliseconds, "saved": rows})
        write_atomically(path, json.dumps({"format": _FORMAT, "measured": measured}, indent=1) + "\n")


def key_text(key: Hashable) -> str:
    """A key as it stands in the file.

    Raises:
        GraphlatheError: it is something else than texts, numbers, and tuples of them.
    """
    try:
        return json.dumps(key, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GraphlatheError(
            f"a {type(key).__name__} cannot name a measurement: {error}", expected="texts, numbers, or tuples of them"
        ) from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType]
