"""Original names against diffusers' own converter, which reads original checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from finetune.families.naming.ldm import diffusers_name, unet_name
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.sources["denoiser"].folder == "unet"])
def test_every_unet_weight_comes_back_under_its_own_name(name: str, tiny_bases: dict[str, Path]) -> None:
    """Each weight of our original naming holds its diffusers name's number; diffusers must put it back there."""
    unet = load_family(str(tiny_bases[name])).parts["denoiser"]
    config = dict(unet.config)
    numbered = {key: torch.tensor(float(index)) for index, key in enumerate(unet.state_dict())}
    original = {}
    for key, number in numbered.items():
        path, leaf = key.rsplit(".", 1)
        original[f"model.diffusion_model.{unet_name(path, config)}.{leaf}"] = number
    again = convert_ldm_unet_checkpoint(original, config)
    assert {key: float(value) for key, value in again.items()} == {key: float(n) for key, n in numbered.items()}
    for path, module in unet.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            assert diffusers_name(unet_name(path, config), config) == path
