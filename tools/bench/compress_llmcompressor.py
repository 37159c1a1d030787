"""llm-compressor's Wanda and SparseGPT, at as many numbers that are not zero as the others' parameters.

Both zero weights inside the blocks' linear layers and leave the shapes alone, so that time does not fall. The recipe is
the one of its documentation: unstructured, all linear layers but the output layer, one-shot on the calibration data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import GraphlatheError
from ...ir.from_hub import load_tokenizer
from ..smollm2 import smollm2_file
from .base import Row
from .compress_modules import Transformer, parameters
from .compress_peers import load_peer
from .compress_subject import Case, export_module, subject_of
from .compress_work import Search


def sparsify(case: Mapping[str, Any], level: Mapping[str, Any], target: str, modifier: str) -> Row:
    """Apply one of its modifiers (``WandaPruningModifier``, ``SparseGPTModifier``).

    Raises:
        GraphlatheError: the level names no parameters, or more than the linear layers have are to go.
    """
    chosen = Case.from_json(case)
    subject = subject_of(chosen)
    tool = load_peer(chosen.peers, "llmcompressor")
    modifiers = load_peer(chosen.peers, "llmcompressor.modifiers.pruning")
    module: Any = subject.module()
    linear = sum(m.weight.numel() for m in Transformer(module).blocks.modules() if isinstance(m, torch.nn.Linear))
    if not level["params"]:
        raise GraphlatheError("zeros do not change the multiply-adds that are executed, which is what the level limits")
    sparsity = (parameters(module) - level["params"]) / linear
    if not 0 < sparsity < 1:
        raise GraphlatheError(f"a sparsity of {sparsity:.2f} of the linear layers would be needed")
    batches = subject.calibration()
    rows = [{**feeds, "attention_mask": torch.ones_like(feeds["input_ids"])} for feeds in batches]
    data: Any = torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
    recipe = getattr(modifiers, modifier)(
        sparsity=sparsity, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"]
    )
    # It reads the configuration of a model in memory again, from where the model says that it came from.
    folder = str(Path(target).with_name("configuration"))
    module.config.save_pretrained(folder)
    module.config._name_or_path = module.name_or_path = folder
    search = Search(subject, module)
    with search:
        tool.oneshot(
            model=module,
            dataset=data,
            tokenizer=load_tokenizer(smollm2_file()),
            recipe=recipe,
            max_seq_length=chosen.window,
            num_calibration_samples=len(batches),
            shuffle_calibration_samples=False,
        )
    # The module comes back with hooks that cannot be traced: its weights go into a fresh one.
    fresh = subject.module()
    fresh.load_state_dict({name: value.detach().clone() for name, value in module.state_dict().items()})
    export_module(subject, fresh, target)
    return {**search.row(), "plan": {"sparsity": sparsity}}
