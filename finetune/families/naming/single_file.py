"""Converts a family to a single-file checkpoint in the original (LDM, SGM) layout, and such a file to a diffusers
folder.

The file holds only weights. Configs, tokenizers and the scheduler come from `like`, a folder of the same kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from finetune.core.errors import BadInput
from finetune.core.files import cache_dir, copy_plain, replacing_folder, save_tensors, sha256, sweep, write_json
from finetune.families.configs import read_config, refuse_links
from finetune.families.naming.base import SingleFile
from finetune.families.naming.clip import strip_text_model
from finetune.families.naming.ldm import open_clip_name, unet_name, vae_name
from finetune.families.parts import PartSources, skeletons
from finetune.objectives.schedule import Schedule

V, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors that say what a file predicts, and that its last timestep is all noise
UNET, VAE = "model.diffusion_model.", "first_stage_model."

SCHEDULER = "scheduler/scheduler_config.json"
SPECIFIED = {"epsilon": "epsilon", "v": "v_prediction"}  # modelspec's words -> diffusers'


@dataclass(frozen=True)
class Entry:
    """One weight: its name in the part, its name in the file, and its third of that tensor (None: the whole)."""

    key: str
    original: str
    third: int | None = None
    transposed: bool = False


def entries(layout: SingleFile, part: str, module: nn.Module) -> Iterator[Entry]:
    """Every weight of a part, with its name in the file."""
    config = dict(cast(Any, module).config) if part in ("denoiser", "vae") else {}
    for key in module.state_dict():
        path, leaf = key.rsplit(".", 1)
        if part == "denoiser":
            yield Entry(key, f"{UNET}{unet_name(path, config)}.{leaf}")
        elif part == "vae":
            yield Entry(key, f"{VAE}{vae_name(path, config)}.{leaf}")
        elif not key.endswith("position_ids"):
            yield _text_entry(layout, part, key)


def _text_entry(layout: SingleFile, part: str, key: str) -> Entry:
    prefix, is_open_clip = layout.texts[part]
    plain = strip_text_model(key)
    if not is_open_clip:
        return Entry(key, prefix + plain)
    name, third = open_clip_name(plain)
    return Entry(key, prefix + name, third, transposed=name == "text_projection")


def pack(layout: SingleFile, parts: Mapping[str, nn.Module], dtype: torch.dtype) -> dict[str, Tensor]:
    """A family's parts as the tensors of an original checkpoint, in one precision."""
    packed: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for part, module in parts.items():
        weights = module.state_dict()
        for entry in entries(layout, part, module):
            value = weights[entry.key].detach().cpu().to(dtype)
            if entry.third is not None:
                thirds.setdefault(entry.original, {})[entry.third] = value
            else:
                packed[entry.original] = _stored(entry, value)
    joined = {name: torch.cat([held[n] for n in range(3)]) for name, held in thirds.items()}
    return packed | joined


def marks(layout: SingleFile, schedule: Schedule) -> dict[str, Tensor]:
    """The empty tensors from which ComfyUI, Forge and sdnext know what a file predicts; NoobAI's files have them."""
    if not layout.marked or schedule.prediction != "v_prediction":
        return {}
    zero_snr = float(schedule.alphas_cumprod[-1]) == 0
    return {name: torch.tensor([]) for name in (V, *[ZERO_SNR] * zero_snr)}


def _stored(entry: Entry, value: Tensor) -> Tensor:
    if entry.original.startswith(VAE) and ".mid.attn_1." in entry.original and value.ndim == 2:
        return value[:, :, None, None]  # the file stores it as a 1x1 convolution
    return value.T.contiguous() if entry.transposed else value


def detect(keys: list[str], shapes: dict[str, torch.Size], layouts: Mapping[str, SingleFile]) -> str:
    """The family of a checkpoint: finds the one of `layouts` (family -> its layout) that its tensors have.

    Raises:
        BadInput: the file is not a checkpoint, or its kind is not supported; the message names the kind.
    """
    first = next((shapes[key] for key in keys if key == f"{UNET}input_blocks.0.0.weight"), None)
    if first is None:
        raise BadInput("it has no UNet in the original layout (model.diffusion_model...): give a complete checkpoint")
    if first[1] != 4:
        kind = {9: "inpainting", 5: "depth", 8: "editing"}.get(int(first[1]), "another")
        raise BadInput(f"its UNet has {first[1]} input channels ({kind}): give a text-to-image checkpoint")
    for family, layout in layouts.items():
        if all(any(key.startswith(prefix) for key in keys) for prefix, _ in layout.texts.values()):
            return family
    if any(key.startswith("conditioner.embedders.0.model.") for key in keys):
        raise BadInput("it is an SDXL refiner: give the SDXL base")
    raise BadInput("it has no known text encoder: give a complete checkpoint of SD 1.x, SD 2.x or SDXL")


def unpack(file: Path, like: Path, sources: PartSources, layout: SingleFile, by_header: bool = False) -> Path:
    """Converts the checkpoint to a diffusers folder in the cache, in the file's own precision. The folder is named by
    the file's hash, and reused while the configs of `like` are the same. What the file says by `v_pred` and `ztsnr`
    replaces what the scheduler of `like` says.

    by_header: so does the `modelspec.prediction_type` in its header: nobody chose `like` for this file.

    Raises:
        BadInput: a weight is missing, or its shape differs from the config of `like`.
    """
    with safe_open(file, "pt") as opened:
        said = _said_by({V, ZERO_SNR}.intersection(opened.keys()))
        if by_header and not said:
            said = _said_in(opened.metadata() or {}, like)
    name = hashlib.sha256(f"{sha256(file)}{like}{said or ''}".encode()).hexdigest()[:16]
    folder = cache_dir() / "checkpoints" / name
    if folder.is_dir() and _has_configs_of(folder, like, said):
        return folder
    refuse_links(like)
    sweep(folder.parent, 86_400)  # keeps newer ones: another process may be writing there
    with replacing_folder(folder) as temporary, safe_open(file, "pt") as opened:
        for source in _configs(like):
            copy_plain(source, temporary / source.relative_to(like), like)
        if said:
            write_json(temporary / SCHEDULER, read_config(like, SCHEDULER) | said)
        for part, skeleton in skeletons(sources, like, list(sources)).items():
            tensors = dict(unpacked(_Lazy(opened), layout, part, skeleton, file))
            title = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
            save_tensors(temporary / sources[part].folder / f"{title}.safetensors", tensors, {"format": "pt"})
    return folder


def _configs(folder: Path) -> list[Path]:
    """The configs and tokenizers of a diffusers folder, without what lists the files of its weights."""
    found = {*folder.glob("*.json"), *folder.glob("*/*.json"), *folder.glob("tokenizer*/*")}
    return sorted(file for file in found if not file.name.endswith(".index.json"))


def _has_configs_of(folder: Path, like: Path, said: Mapping[str, Any]) -> bool:
    """Whether a folder of an earlier call still has the configs that `like` has now."""
    names = [file.relative_to(like) for file in _configs(like)]
    if names != [file.relative_to(folder) for file in _configs(folder)]:
        return False
    if said and read_config(folder, SCHEDULER) != read_config(like, SCHEDULER) | dict(said):
        return False
    same = (name for name in names if not (said and name.as_posix() == SCHEDULER))
    return all((folder / name).read_bytes() == (like / name).read_bytes() for name in same)


class _Lazy(Mapping[str, Tensor]):
    """An opened safetensors file as a mapping that reads one tensor at a time."""

    def __init__(self, opened: Any) -> None:
        self.opened, self.names = opened, set(opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self.opened.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def unpacked(
    held: Mapping[str, Tensor], layout: SingleFile, part: str, module: nn.Module, file: Path
) -> Iterator[tuple[str, Tensor]]:
    """(name in the part, weight) for all of a part's weights, from a checkpoint's tensors.

    Raises:
        BadInput: one is missing, or has another shape than the module.
    """
    weights = module.state_dict()
    for entry in entries(layout, part, module):
        if entry.original not in held:
            raise BadInput(
                f"{file} has no {entry.original}: give a complete file, or choose a folder of the same kind with "
                "base.like"
            )
        value = held[entry.original]
        if entry.third is not None:
            value = value.chunk(3)[entry.third]
        value = value.T if entry.transposed else value
        wanted = weights[entry.key].shape
        if value.numel() != wanted.numel():
            raise BadInput(
                f"{file}: {entry.original} has shape {tuple(value.shape)} but base.like has {tuple(wanted)}: "
                "choose a folder of the same kind with base.like"
            )
        yield entry.key, value.reshape(wanted).contiguous()


def _said_by(found: Set[str]) -> dict[str, Any]:
    """The settings of a scheduler that a file's marks stand for. `ztsnr` alone says nothing in ComfyUI, and here."""
    if V not in found:
        return {}
    return {"prediction_type": "v_prediction"} | ({"rescale_betas_zero_snr": True} if ZERO_SNR in found else {})


def _said_in(header: Mapping[str, str], like: Path) -> dict[str, Any]:
    """What a file's header says of its prediction (modelspec 1.0.1), where `like` says another. SD2's bases have the
    same weights' names and shapes, and predict noise at 512 pixels and v at 768."""
    told = SPECIFIED.get(header.get("modelspec.prediction_type", ""))
    own = read_config(like, SCHEDULER).get("prediction_type", "epsilon")
    return {"prediction_type": told} if told not in (None, own) else {}
