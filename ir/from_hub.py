"""Hugging Face front end: a local checkpoint folder, or a GGUF file, to `Program`, through `transformers`.

The model is built without its weights, traced, and each parameter is then bound to its byte range in the safetensors
files: an 8B-parameter checkpoint opens without reading it. Where names do not match one to one, the library loads the
model for real, and ``program.metadata["weights"]`` says so.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from .errors import GraphlatheError, ImportModelError
from .from_torch import Dynamic, trace
from .hub_inputs import default_inputs
from .hub_model import (
    architecture_class,
    build_model,
    import_transformers,
    match_weights,
    untie_where_different,
    without_cache,
)
from .program import Program
from .safetensors_index import main_dtype, read_checkpoint
from .weights import Weight

_READ_AGAIN = "the files may be truncated or incomplete: download or copy the folder again"


def from_hub(
    path: str | os.PathLike[str] | Any,
    *,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic: Dynamic = "default",
    dtype: torch.dtype | None = None,
    meta: bool = False,
    gguf_file: str | None = None,
) -> Program:
    """Read and trace a local checkpoint.

    Args:
        path: a checkpoint folder (``config.json`` and safetensors, sharded or not), a ``.gguf`` file, or a folder that
            holds one. With ``meta``, a folder with ``config.json`` alone, or a configuration object, is enough.
        example_inputs: what to trace with, see `ir.from_torch.trace`; by default chosen by architecture, see
            `ir.hub_inputs`.
        dynamic: dynamic dimensions, see `ir.from_torch.trace`; ``"default"`` takes those of the default inputs (and
            none with inputs of your own).
        dtype: the element type to run in; by default the configuration's, else that of most stored elements. Weights
            stored in another type are cast when read, not before.
        meta: structure only: no weight file is opened, and the program cannot run.
        gguf_file: which GGUF file of the folder.

    Returns:
        The program. ``metadata`` holds ``producer``, ``source``, ``architecture``, and ``weights``: how they are held.

    Raises:
        ImportModelError: something is missing, truncated or unknown; or the model cannot be traced.
    """
    import_transformers()
    if not isinstance(path, (str, os.PathLike)):
        if not meta:
            raise ImportModelError(
                "a configuration has no weights",
                remedy="pass the checkpoint folder, or meta=True",
            )
        return _trace(
            build_model(path, dtype or _dtype_of(path) or torch.float32),
            example_inputs,
            dynamic,
            "meta: shapes and dtypes only",
        )
    source = Path(path)
    gguf = find_gguf(source, gguf_file)
    if gguf is not None:
        return _from_gguf(gguf, example_inputs, dynamic, dtype, meta)
    config = _read_config(source)
    if meta:
        model = build_model(config, dtype or _dtype_of(config) or torch.float32)
        return _trace(model, example_inputs, dynamic, "meta: shapes and dtypes only", source)
    stored = read_checkpoint(source)
    if not stored:
        return _really_loaded(
            source,
            config,
            example_inputs,
            dynamic,
            dtype,
            "the folder holds no safetensors file",
        )
    model = build_model(config, dtype or _dtype_of(config) or main_dtype(stored))
    found, missing = match_weights(model, stored)
    untied = untie_where_different(model, found)
    program = _trace(
        model,
        example_inputs,
        dynamic,
        "lazy: read from safetensors when needed",
        source,
    )
    unmatched = _bind(program, found, missing)
    if unmatched:
        return _really_loaded(
            source,
            config,
            example_inputs,
            dynamic,
            dtype,
            _few(unmatched) + " match no stored tensor one to one",
        )
    if untied:
        program.metadata["untied"] = ", ".join(untied)
    return program


def load_tokenizer(path: str | os.PathLike[str], *, gguf_file: str | None = None) -> Any:
    """The `transformers` tokenizer of a checkpoint folder or a GGUF file.

    Raises:
        ImportModelError: there is none, or it cannot be read.
    """
    transformers = import_transformers()
    source = Path(path)
    gguf = find_gguf(source, gguf_file)
    if gguf is None and not source.is_dir():
        raise ImportModelError(f"no folder '{source}'")
    try:
        with _quiet():
            if gguf is not None:
                return transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            return transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:
        raise ImportModelError(
            f"cannot read the tokenizer of '{source}': {_first_line(error)}",
            remedy="the folder must hold tokenizer.json (or what the model's tokenizer needs)",
        ) from error


def find_gguf(source: Path, gguf_file: str | None = None) -> Path | None:
    """The GGUF file that a path means, or None when it means a checkpoint folder.

    Raises:
        ImportModelError: it is missing, is no GGUF file, or there are several to choose from.
    """
    if gguf_file is not None:
        file = source / gguf_file
    elif source.suffix == ".gguf":
        file = source
    elif source.is_dir() and not (source / "config.json").is_file():
        files = sorted(source.glob("*.gguf"))
        if len(files) > 1:
            raise ImportModelError(
                f"'{source}' holds {len(files)} GGUF files",
                remedy=f"pass gguf_file={files[0].name!r}",
            )
        if not files:
            return None
        file = files[0]
    else:
        return None
    if not file.is_file():
        raise ImportModelError(f"no file '{file}'")
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ImportModelError(f"'{file}' is no GGUF file", expected="a file that starts with 'GGUF'")
    return file


def _read_config(folder: Path) -> Any:
    if not folder.is_dir():
        raise ImportModelError(f"no folder '{folder}'", expected="a checkpoint folder or a .gguf file")
    if not (folder / "config.json").is_file():
        raise ImportModelError(
            f"'{folder}' holds no config.json",
            expected="config.json and safetensors files, or a .gguf file",
        )
    try:
        config = import_transformers().AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ImportModelError(
            f"cannot read '{folder / 'config.json'}': {_first_line(error)}",
            remedy="its model_type must be one that the installed transformers knows",
        ) from error
    if getattr(config, "quantization_config", None):
        raise ImportModelError(
            f"'{folder}' holds quantized weights ({config.quantization_config.get('quant_method', 'unknown method')})",
            expected="weights in a floating-point type",
            remedy="convert the checkpoint to float, or export it as GGUF",
        )
    return config


def _dtype_of(config: Any) -> torch.dtype | None:
    value = getattr(config, "dtype", None)
    if isinstance(value, str):
        value = getattr(torch, value, None)
    return value if isinstance(value, torch.dtype) else None


def _trace(
    model: Any,
    example_inputs: Any,
    dynamic: Dynamic,
    weights: str,
    source: Path | None = None,
) -> Program:
    if example_inputs is None:
        inputs, names = default_inputs(model, model.config)
    else:
        inputs, names = example_inputs, None  # type: ignore[assignment]
    program = trace(model, inputs, dynamic=names if dynamic == "default" else dynamic)
    program.metadata |= {
        "producer": "transformers",
        "architecture": type(model).__name__,
        "weights": weights,
    }
    if source is not None:
        program.metadata["source"] = source.name
    return program


def _bind(program: Program, found: Mapping[str, Weight], missing: Sequence[str]) -> list[str]:
    """Put the stored weights in place of the fake ones; returns the used names for which nothing is stored."""
    lacking = set(missing)
    for name in list(program.weights):
        if name in found:
            program.weights[name] = found[name]
    return [name for name, weight in program.weights.items() if name in lacking or weight.is_meta]


def _really_loaded(
    source: Path,
    config: Any,
    example_inputs: Any,
    dynamic: Dynamic,
    dtype: torch.dtype | None,
    why: str,
) -> Program:
    cls = architecture_class(config)
    without_cache(config)
    if not any(source.glob("*.safetensors")) and not any(source.glob("*.bin")):
        raise ImportModelError(
            f"'{source}' holds no weights",
            expected="safetensors files",
            remedy="pass meta=True for the structure alone",
        )
    try:
        with _quiet():
            model, info = cls.from_pretrained(
                source,
                config=config,
                dtype=dtype or _dtype_of(config) or "auto",
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise ImportModelError(
            f"transformers cannot load '{source}': {_first_line(error)}",
            remedy=_READ_AGAIN,
        ) from error
    program = _trace(
        model.eval(),
        example_inputs,
        dynamic,
        f"in memory: loaded by transformers, because {why}",
        source,
    )
    lacking = [
        name for name in program.weights if name in set(info["missing_keys"]) | {m[0] for m in info["mismatched_keys"]}
    ]
    if lacking:
        raise ImportModelError(
            f"the checkpoint lacks weights that {cls.__name__} needs: {_few(lacking)}",
            remedy='it may belong to another class: correct "architectures" in config.json',
        )
    return program


def _from_gguf(file: Path, example_inputs: Any, dynamic: Dynamic, dtype: torch.dtype | None, meta: bool) -> Program:
    transformers = import_transformers()
    try:
        with _quiet():
            stored = _gguf_types(file)
            config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            without_cache(config)
            if meta:
                model = build_model(config, dtype or torch.float32)
                return _trace(model, example_inputs, dynamic, "meta: shapes and dtypes only", file)
            auto = (
                transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
            )
            model = auto.from_pretrained(
                file.parent,
                gguf_file=file.name,
                config=config,
                dtype=dtype or torch.float32,
            )
    except GraphlatheError:
        raise
    except ImportError as error:
        raise ImportModelError(
            f"reading a GGUF file needs more packages: {_first_line(error)}",
            remedy="pip install 'graphlathe[hub]'",
        ) from error
    except Exception as error:
        raise ImportModelError(f"cannot read '{file}': {_first_line(error)}", remedy=_READ_AGAIN) from error
    note = f"in memory: dequantized from {stored} to {str(model.dtype).removeprefix('torch.')}"
    return _trace(model.eval(), example_inputs, dynamic, note, file)


def _gguf_types(file: Path) -> str:
    """The storage types of a GGUF file, by share of the elements: ``Q4_1 (99%), F32 (1%)``."""
    import gguf

    elements: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(file).tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
    total = sum(elements.values())
    return ", ".join(f"{name} ({count / total:.2%})" for name, count in elements.most_common())


@contextmanager
def _quiet() -> Generator[None]:
    """Keep the library's progress bars and advice to itself: what matters to the user is in the program's metadata."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # Its GGUF reader draws a bar that no setting turns off.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
