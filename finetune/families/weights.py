"""Loads a part's weights from its folder, and checks that they are complete and fit its config."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from finetune.core.errors import BadInput
from finetune.core.pickles import may_read_pickles
from finetune.families.configs import UNFIT, check_index


def load_weights(folder: Path, kind: Any, dtype: torch.dtype, **options: Any) -> nn.Module:
    """Loads a diffusers or transformers model of class `kind` from its folder. `options` go to its constructor.

    Raises:
        BadInput: the weights are missing, not allowed, damaged, or do not fit the config. Both libraries would fill
            missing weights with random numbers and continue.
    """
    pickled = not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin"))
    if pickled and not may_read_pickles():
        raise BadInput(
            f"{folder} holds its weights as a pickle (.bin), which can run code: convert it to safetensors, or pass "
            "--allow-pickle to read only its tensors"
        )
    for index in sorted(folder.glob("*.index.json")):
        check_index(index)
    keywords: dict[str, Any] = {"use_safetensors": not pickled, "output_loading_info": True, **options}
    keywords["torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype"] = dtype
    model: nn.Module
    try:
        model, info = kind.from_pretrained(folder, **keywords)
    except (OSError, SafetensorError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{folder} has no weights that can be read ({reason}): fetch the base again") from error
    except (*UNFIT, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"the weights in {folder} do not fit its config.json ({reason}): fetch the base again"
        ) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise BadInput(
            f"the weights in {folder} do not fit its config.json ({len(missing)} are missing or have another shape, "
            f"such as {missing[0]}): fetch the base again"
        )
    return model
