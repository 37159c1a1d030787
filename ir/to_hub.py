"""Write a compressed program as a checkpoint folder that `transformers` loads.

The architecture stays what it was; its configuration has to say the new sizes. Which fields do is found by trying, see
`ir.hub_config`, and what comes out is believed only when the model that was loaded again computes what the program
does. Blocks that were dropped close ranks: layer 3 of 0, 1, 3 becomes layer 2.
"""

from __future__ import annotations

import copy
import os
import secrets
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from .axes.relate import bind
from .errors import ExportError, GraphlatheError, ImportModelError
from .flow import op_name
from .hub_config import Search, empty_model, shapes_of
from .hub_inputs import default_inputs
from .hub_model import architecture_class, import_transformers, without_cache
from .hub_names import Names, Shape, weights_by_name
from .program import Program
from .safetensors_index import main_dtype, read_checkpoint
from .verify import TOLERANCE, relative_error
from .weights import Weight

_BESIDE = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "chat_template*", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "generation_config.json", "LICENSE*",
)  # fmt: skip
"""What lies beside the weights and stays as it is: tokenizer, processor, generation settings, license."""

_MOST_TRIALS = 8
_UNIFORM = "cut all layers to the same size (edit the plan to that), or export ONNX, which has no such limits"
_ONNX = "export ONNX, which has no such limits"
_UNDO = "undo changes to the graph that no configuration says"


def to_hub(
    program: Program,
    folder: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | Any,
    architecture: str | type[Any] | None = None,
    example_inputs: Mapping[str, torch.Tensor] | None = None,
    tolerance: float | None = None,
) -> Path:
    """Write ``config.json``, the weights, and the tokenizer's files.

    The weights must have the names of the original checkpoint: those of a program that was traced from a module of
    `transformers` or read with `from_hub`, also after passes that drop blocks and cut channels.

    Args:
        program: what to write.
        folder: where; it must not exist, or be empty.
        config: the original folder, or its configuration object. Weights that the program does not read (a pooler that
            no output needs) are taken from the folder; so are the tokenizer's files.
        architecture: the model's class, or its name (``LlamaForCausalLM``) where neither the configuration nor the
            program says it.
        example_inputs: inputs by name, for comparing; by default those of `ir.hub_inputs`.
        tolerance: allowed ``max|a-b| / max|b|`` between the outputs of the program and of the model that was loaded
            again; by default ten times that of `ir.verify.TOLERANCE` for the program's dtype.

    Returns:
        The folder.

    Raises:
        ExportError: no configuration of this architecture describes the program, a weight is missing, or the folder
            cannot be written. Nothing is left behind.
        ImportModelError: the original configuration cannot be read.
    """
    target = Path(folder)
    _check_folder(target)
    source = Path(config) if isinstance(config, (str, os.PathLike)) else None
    original = _configuration(source if source is not None else config)
    if isinstance(architecture, type):
        cls = architecture
    else:
        named = [architecture, *(getattr(original, "architectures", None) or ()), program.metadata.get("architecture")]
        original.architectures = [name for name in named if name][:1]
        cls = architecture_class(original)
    export = _Export(program, source, original, cls, example_inputs, tolerance)
    model = export.model()
    partial = target.absolute().with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with _quiet():
            model.save_pretrained(partial)
        if source is not None:
            _copy_beside(source, partial)
        export.check_again(partial)
        if target.exists():
            target.rmdir()  # it is empty
        os.replace(partial, target)
    except OSError as error:
        raise ExportError(
            f"cannot write '{target}': {error.strerror or error}", remedy="check free space and permissions"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"cannot write '{folder}': it exists and is not empty", remedy="name a new folder")
    if not folder.absolute().parent.is_dir():
        raise ExportError(
            f"cannot write '{folder}': there is no folder '{folder.absolute().parent}'", remedy="create it"
        )


def _configuration(source: Path | Any) -> Any:
    transformers = import_transformers()
    if not isinstance(source, Path):
        if not isinstance(source, transformers.PreTrainedConfig):
            raise ImportModelError(
                f"config is a {type(source).__name__}", expected="a checkpoint folder, or a transformers configuration"
            )
        return copy.deepcopy(source)
    if not (source / "config.json").is_file():
        raise ImportModelError(f"'{source}' holds no config.json", expected="the original checkpoint folder")
    try:
        return transformers.AutoConfig.from_pretrained(source, local_files_only=True)
    except Exception as error:
        raise ImportModelError(f"cannot read '{source / 'config.json'}': {error}") from error


def _copy_beside(source: Path, folder: Path) -> None:
    for pattern in _BESIDE:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


class _Export:
    """What is known of the program and of its architecture."""

    def __init__(
        self,
        program: Program,
        source: Path | None,
        config: Any,
        architecture: type[Any],
        inputs: Mapping[str, torch.Tensor] | None,
        tolerance: float | None,
    ) -> None:
        self.program, self.source, self.config, self.architecture = program, source, config, architecture
        try:
            self.old = shapes_of(config, architecture)
        except Exception as error:
            raise ImportModelError(f"cannot build {architecture.__name__} from its configuration: {error}") from error
        self.own = self._named()
        self.dtype = main_dtype({name: w for name, w in self.own.items() if w.dtype.is_floating_point})
        self.tolerance = 10 * TOLERANCE.get(self.dtype, 1e-5) if tolerance is None else tolerance
        self.names = Names(self.old, self.own)
        self.filled = self._unread()
        self.feeds = self._inputs(inputs)

    def _named(self) -> dict[str, Weight]:
        own = weights_by_name(self.program, self.old)
        if not own:
            raise ExportError(
                f"the program holds no weight of {self._architecture}",
                expected=f"names such as '{next(iter(self.old))}'",
                remedy="export a program that was traced from the transformers model, or read with from_hub",
            )
        empty = next((name for name, weight in own.items() if weight.is_meta), None)
        if empty:
            raise ExportError(f"the weight '{empty}' has no numbers", remedy="load the checkpoint itself")
        return own

    @property
    def _architecture(self) -> str:
        return self.architecture.__name__

    def _unread(self) -> dict[str, Weight]:
        """Weights that the program does not read, from the original folder."""
        missing = [name for name in self.names.before.values() if name not in self.own]
        for layer in filter(None, map(self.names.layers_with, missing)):
            stack, number, rest, alike = layer
            raise ExportError(
                f"layer {number} of '{stack}' has no '{rest}' any more, layers {', '.join(map(str, alike))} have one: "
                f"{type(self.config).__name__} describes layers that are alike",
                remedy=f"drop whole blocks, or {_ONNX}",
            )
        if not missing:
            return {}
        stored = read_checkpoint(self.source) if self.source is not None else {}
        lacking = [name for name in missing if name not in stored or stored[name].shape != self.old[name]]
        if lacking:
            foreign = self._foreign()
            raise ExportError(
                f"the program does not read '{lacking[0]}'{_more(lacking)}, which {self._architecture} has"
                + self._also_reads(foreign),
                expected="every weight of the architecture" + (", and no other" if foreign else ""),
                remedy=_ONNX
                if foreign
                else "pass the original folder as config, from which weights that nothing reads are taken",
            )
        return {name: stored[name] for name in missing}

    # The model.

    def model(self) -> Any:
        """The architecture with the program's weights, under a configuration that describes them.

        Raises:
            ExportError: there is none.
        """
        target: dict[str, Shape | None] = {
            name: self.own[old].shape if old in self.own else None for name, old in self.names.before.items()
        }
        search = Search(self.config, self.architecture, self.old, target, self.names.stacks, self.names.before)
        tried: list[str] = []
        norms = {eps for node in self.program.graph.nodes if (eps := _epsilon(node)) is not None}
        for solution in search.with_epsilon(norms):
            try:
                model = self._filled(solution.config)
                error = self.error(model)
            except (GraphlatheError, RuntimeError, ValueError, TypeError, IndexError) as failure:
                tried.append(f"{_said(solution.changes)}: {str(failure).splitlines()[0]}")
            else:
                if error <= self.tolerance:
                    return model
                tried.append(f"{_said(solution.changes)}: relative error {error:.1e}")
            if len(tried) == _MOST_TRIALS:
                break
        if tried:
            foreign = self._foreign()
            biases = bool(foreign) and all(name.endswith("bias") for name in foreign)
            undo = "use a pass that adds no biases, such as compress{compensation=none}" if biases else _UNDO
            raise ExportError(
                f"{self._architecture} has the program's shapes under another configuration, but computes something "
                f"else ({'; '.join(tried)})" + self._also_reads(foreign),
                expected=f"outputs that are equal within {self.tolerance:.0e}",
                remedy=f"{undo}, or {_ONNX}",
            )
        raise self._refusal(search)

    def _also_reads(self, foreign: Sequence[str]) -> str:
        if not foreign:
            return ""
        return f"; the program also reads '{foreign[0]}'{_more(foreign)}, which {self._architecture} has not"

    def _foreign(self) -> list[str]:
        """Weights that the program reads and the architecture does not have (its own tables left out), sorted."""
        model = empty_model(self.config, self.architecture, self.dtype)
        known = {self.program.tied.get(name, name) for name in self.own} | {f"{name}_transposed" for name in self.own}
        unknown = self.program.used_weights() - known - dict(model.named_buffers()).keys()
        return sorted(name for name in unknown if self.program.weights[name].numel > 1)

    def _filled(self, config: Any) -> Any:
        model = empty_model(config, self.architecture, self.dtype)
        state = {
            name: (self.own[old] if old in self.own else self.filled[old]).tensor().contiguous()
            for name, old in self.names.before.items()
        }
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        for part, given in zip(_parts(model.config), _parts(config), strict=True):
            if hasattr(given, "use_cache"):
                part.use_cache = given.use_cache
        return model.eval()

    def error(self, model: Any) -> float:
        """How far a model's outputs are from the program's."""
        entry = self.program.main
        cached = [(part, part.use_cache) for part in _parts(model.config) if hasattr(part, "use_cache")]
        without_cache(model.config)
        try:
            with torch.no_grad():
                actual = model(**self.feeds, **entry.constants)
        finally:
            for part, value in cached:
                part.use_cache = value
        expected = self.program.run(self.program.feeds(**self.feeds))
        named = dict(actual) if isinstance(actual, Mapping) else {}
        if not set(expected) <= set(named):
            leaves = [v for v in tree_leaves(actual) if isinstance(v, torch.Tensor)]
            named = dict(zip(expected, leaves, strict=False))
        return relative_error({name: named.get(name) for name in expected}, expected)

    def check_again(self, folder: Path) -> None:
        """Load what was written, and compare again.

        Raises:
            ExportError: it cannot be loaded, lacks weights, or computes something else.
        """
        try:
            with _quiet():
                model, info = self.architecture.from_pretrained(
                    folder, dtype="auto", local_files_only=True, output_loading_info=True
                )
        except Exception as error:
            raise ExportError(f"the written checkpoint cannot be loaded again: {error}", remedy=_ONNX) from error
        wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
        if wrong:
            raise ExportError(f"the written checkpoint is not complete: {wrong}", remedy=_ONNX)
        error = self.error(model.eval())
        if not error <= self.tolerance:
            raise ExportError(
                f"the written checkpoint computes something else when it is loaded: relative error {error:.1e}",
                expected=f"at most {self.tolerance:.0e}",
                remedy=_ONNX,
            )

    def _inputs(self, given: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
        if given is None:
            try:
                inputs, _ = default_inputs(empty_model(self.config, self.architecture, self.dtype), self.config)
                generator = torch.Generator().manual_seed(0)
                given = {
                    name: torch.randn(value.shape, generator=generator).to(value.dtype)
                    if value.is_floating_point()
                    else value
                    for name, value in inputs.items()
                }
                self.program.check_feeds(self.program.feeds(**given))
            except GraphlatheError as error:
                raise ExportError(
                    "there are no default inputs to compare the checkpoint with",
                    expected=f"inputs: {', '.join(self.program.main.inputs)}",
                    remedy="pass example_inputs={...}",
                ) from error
        self.program.check_feeds(self.program.feeds(**given))
        return dict(given)

    # Why not.

    def _refusal(self, search: Search) -> ExportError:
        kind = type(self.config).__name__
        for stack in self.names.stacks:
            for rest, layers in self.names.by_layer(stack).items():
                name = f"{stack.name}.{next(iter(layers))}.{rest}"
                for dim in range(len(self.old[name])):
                    before = {self.old[f"{stack.name}.{layer}.{rest}"][dim] for layer in layers}
                    after = [shape[dim] for shape in layers.values()]
                    if len(before) == 1 and len(set(after)) > 1:
                        fields = " and one ".join(f"'{field}'" for field in search.fields_of(name, dim))
                        return ExportError(
                            f"the layers of '{stack.name}' have different widths in '{rest}' "
                            f"({', '.join(map(str, after))} in layers {', '.join(map(str, layers))}): "
                            f"{kind} has one {fields or 'size'} for all",
                            remedy=_UNIFORM,
                        )
        nearest = ""
        if search.closest is not None:
            _, changes, wrong = search.closest
            nearest = f"; the nearest configuration ({_said(changes)}) leaves {len(wrong)} weights of other shapes"
        for name, weight in self.own.items():
            for dim, (before, after) in enumerate(zip(self.old[name], weight.shape, strict=True)):
                if before != after and (search.closest is None or self.names.renumbered(name) in search.closest[2]):
                    fields = " and ".join(f"'{field}'" for field in search.fields_of(name, dim))
                    return ExportError(
                        f"{kind} cannot say that '{name}' is {list(weight.shape)} instead of {list(self.old[name])}: "
                        + (f"it derives the {before} from {fields}" if fields else f"it fixes the {before}")
                        + nearest,
                        expected="a field that changes this size and leaves the others",
                        remedy=_ONNX,
                    )
        left = [f"{len(s.kept)} of {s.size} layers of '{s.name}'" for s in self.names.stacks if len(s.kept) < s.size]
        return ExportError(f"{kind} cannot say that there are {', '.join(left)}{nearest}", remedy=_ONNX)


@contextmanager
def _quiet() -> Generator[None]:
    """Keep the library's progress bars to itself."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _epsilon(node: fx.Node) -> float | None:
    """What a norm adds to its mean of squares."""
    eps = bind(node)["eps"] if op_name(node) in ("rms_norm", "_fused_rms_norm") else None
    return eps if isinstance(eps, float) else None


def _parts(config: Any) -> list[Any]:
    """A configuration and those inside it."""
    return [config, *filter(None, (getattr(config, name, None) for name in getattr(config, "sub_configs", {})))]


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _said(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in changes.items()) or "the original one"


__all__ = ["to_hub"]
