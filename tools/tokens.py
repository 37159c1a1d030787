"""Text for models: a local tokenizer, and windows of token ids as batches that fit a program."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import GraphlatheError, ImportModelError, InputError
from ..ir.from_hub import load_tokenizer
from ..ir.program import Program
from .examples import example_feeds, index_bound, token_input

_ARRAYS = (".npz", ".npy", ".safetensors")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model", "tokenizer.model")


def find_tokenizer(given: Path | None, model: Path) -> Path:
    """Where the tokenizer is: what was given, else the model itself if it brings one.

    Raises:
        ImportModelError: nowhere.
    """
    if given is not None:
        if not given.exists():
            raise ImportModelError(f"no tokenizer at '{given}'", remedy="--tokenizer takes a folder or a GGUF file")
        return given
    if model.suffix == ".gguf":
        return model
    if model.is_dir() and (any((model / name).exists() for name in _TOKENIZER_FILES) or any(model.glob("*.gguf"))):
        return model
    raise ImportModelError(
        f"'{model}' brings no tokenizer",
        remedy="name a folder or GGUF file with --tokenizer; "
        "for a model that reads no tokens, give arrays (.npz, .npy) instead of text",
    )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    # Not `verbose`: a text longer than the model's context is no mistake, it is cut into windows.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        InputError: it is missing, empty, or something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text '{path}': {error}", expected="a UTF-8 text file") from error
    if not text.strip():
        raise InputError(f"the text '{path}' is empty", remedy="give a file with at least one window of text")
    return text


def token_feeds(program: Program, ids: Tensor) -> dict[str, Tensor]:
    """A batch of named inputs around token ids of shape [batch, sequence]: masks are ones, other inputs zeros.

    Raises:
        InputError: the model has no token input, or the ids do not fit it.
    """
    name = _token_input(program)
    node = program.main.input_node(name)
    bound = index_bound(node)
    if bound is not None and int(ids.max()) >= bound:
        raise InputError(
            f"the tokenizer gives ids up to {int(ids.max())}, the model has {bound}",
            remedy="use the model's own tokenizer",
        )
    sizes: dict[Any, int] = {}
    program.main.dims.bind(name, tuple(node.meta["val"].shape), ids.shape, sizes)
    by_name = {dim.name: sizes[dim.symbol] for dim in program.main.dims.by_name.values() if dim.symbol in sizes}
    feeds = example_feeds(program, by_name)
    for other, value in feeds.items():
        if other != name and index_bound(program.main.input_node(other)) is not None:
            feeds[other] = torch.zeros_like(value)
    feeds[name] = ids.to(node.meta["val"].dtype)
    return feeds


def _token_input(program: Program) -> str:
    name = token_input(program)
    if name is None:
        raise InputError(
            "the model takes no token ids, so text cannot be fed to it", remedy="give arrays (.npz, .npy) instead"
        )
    return name


def window_feeds(program: Program, tokenizer: Any, text: str, window: int, windows: int) -> list[dict[str, Tensor]]:
    """Cut a text into windows of token ids, one batch each; a model with fixed sizes gets windows of its own sizes.

    Args:
        program: the program that will read them.
        tokenizer: a tokenizer.
        text: the text.
        window: tokens in a window, where the model's sequence length is dynamic.
        windows: at most this many windows.

    Raises:
        InputError: the text is too short for one batch.
    """
    value = program.main.input_node(_token_input(program)).meta["val"]
    rows = value.shape[0] if isinstance(value.shape[0], int) else 1
    length = value.shape[1] if isinstance(value.shape[1], int) else window
    ids = torch.tensor(encode(tokenizer, text))
    batches = min(len(ids) // (rows * length), windows)
    if not batches:
        raise InputError(
            f"the text has {len(ids)} tokens, one batch needs {rows * length}",
            remedy="give a longer text, or a smaller --window",
        )
    cut = ids[: batches * rows * length].reshape(batches, rows, length)
    return [token_feeds(program, batch) for batch in cut]


def load_arrays(path: Path) -> dict[str, Tensor]:
    """Named arrays of an ``.npz`` or ``.safetensors`` file, or the one of an ``.npy`` file (named ``array``).

    Raises:
        InputError: it is missing, truncated, or something else.
    """
    import numpy as np

    if not path.is_file():
        raise InputError(f"no file '{path}'")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(str(path)))
        loaded = np.load(path, allow_pickle=False)
        if path.suffix == ".npy":
            return {"array": torch.from_numpy(loaded)}
        if path.suffix == ".npz":
            with loaded:
                return {name: torch.from_numpy(loaded[name]) for name in loaded.files}
    except GraphlatheError:
        raise
    except Exception as error:
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"cannot read arrays from '{path}': {detail}", remedy="the file may be truncated: write it again"
        ) from error
    raise InputError(
        f"cannot read '{path}'", expected="a .npz, .npy or .safetensors file", remedy=f"not '{os.fspath(path.suffix)}'"
    )


def check_calibration(paths: tuple[Path, ...], tokenizer: Path | None, model: Path) -> None:
    """Say what is missing before a large model is loaded.

    Raises:
        InputError: a file is missing.
        ImportModelError: there is text, but no tokenizer.
    """
    for path in paths:
        if not path.is_file():
            raise InputError(f"no calibration file '{path}'", remedy="check the path")
        if path.suffix not in _ARRAYS and model.exists():
            find_tokenizer(tokenizer, model)


def calibration_feeds(
    paths: tuple[Path, ...], program: Program, *, tokenizer: Path | None, model: Path, window: int, windows: int
) -> list[dict[str, Tensor]]:
    """Calibration batches from text and array files, each checked against the program's signature.

    Raises:
        InputError: a file cannot be read, or does not fit the program.
        ImportModelError: text without a tokenizer.
    """
    batches: list[dict[str, Tensor]] = []
    for path in paths:
        if path.suffix in _ARRAYS:
            arrays = load_arrays(path)
            if path.suffix == ".npy" and len(program.main.inputs) == 1:
                arrays = {program.main.inputs[0]: arrays["array"]}
            try:
                feeds = program.feeds(**arrays)
                program.check_feeds(feeds)
            except InputError as error:
                message = f"in the calibration file '{path}': {error.message}"
                raise InputError(message, expected=error.expected, remedy=error.remedy) from error
            batches.append(feeds)
        else:
            text = read_text(path)
            batches.extend(
                window_feeds(program, load_tokenizer(find_tokenizer(tokenizer, model)), text, window, windows)
            )
    return batches
