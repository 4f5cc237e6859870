"""The parts of a base: where they are in its folder, how they are loaded, and where they are in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from finetune.core.devices import empty_cache
from finetune.core.errors import BadInput
from finetune.families.configs import read_config, well_formed
from finetune.families.weights import load_weights


@dataclass(frozen=True)
class PartSource:
    """One part of a base: its folder in a diffusers folder, and the diffusers or transformers class of its model.

    `optional`: a base may lack it, and a recipe may leave it out. `fp32_for_fp16`: it overflows in fp16, so it stays
    in fp32 when the base is loaded in fp16.
    """

    folder: str
    kind: Any
    optional: bool = False
    fp32_for_fp16: bool = False

    def is_in(self, base: Path) -> bool:
        return (base / self.folder / "config.json").is_file()

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The part's precision when the base is loaded in `dtype`."""
        return torch.float32 if self.fp32_for_fp16 and dtype == torch.float16 else dtype

    def skeleton(self, base: Path) -> nn.Module:
        """The model built from its config alone, on torch's default device, with random weights (none on meta)."""
        folder = base / self.folder
        read_config(folder, "config.json")  # checks its limits before a library reads it
        with well_formed(folder):
            return self._from_config(folder)

    def _from_config(self, folder: Path) -> nn.Module:
        if issubclass(self.kind, diffusers.ModelMixin):
            module: nn.Module = self.kind.from_config(self.kind.load_config(folder))
        else:
            module = self.kind(self.kind.config_class.from_pretrained(folder))
        return module

    def load(self, base: Path, dtype: torch.dtype) -> nn.Module:
        """Loads the model with its weights, frozen and in eval mode.

        Raises:
            BadInput: its files are missing or damaged.
        """
        if not self.is_in(base):
            raise BadInput(f"{base} has no {self.folder}/config.json: the base must be a complete diffusers folder")
        module: Any = load_weights(base / self.folder, self.kind, self.dtype(dtype))
        if issubclass(self.kind, diffusers.AutoencoderKL):
            module.enable_slicing()  # one image at a time: memory does not grow with the batch
        frozen: nn.Module = module.requires_grad_(False).eval()
        return frozen


PartSources = Mapping[str, PartSource]


def present(sources: PartSources, folder: Path, without: Sequence[str] = ()) -> list[str]:
    """The names of the parts to load: all, except those in `without` and optional ones that the folder lacks.

    Raises:
        BadInput: `without` names a part that is needed.
    """
    optional = [name for name, source in sources.items() if source.optional]
    needed = next((name for name in without if name not in optional), None)
    if needed is not None:
        can = f"only {', '.join(optional)} can be left out" if optional else "all of its parts are needed"
        raise BadInput(f"base.without has {needed!r}, which this base needs ({can}): remove it")
    lacking = [name for name in optional if not sources[name].is_in(folder)]
    return [name for name in sources if name not in (*without, *lacking)]


def skeletons(
    sources: PartSources, folder: Path, parts: Sequence[str], device: torch.device | str = "meta"
) -> dict[str, nn.Module]:
    """Builds those of `parts` that the folder has from their configs: part name -> module. No weights are read: they
    are absent on the meta device, and random on others."""
    with torch.device(device):
        return {
            name: source.skeleton(folder)
            for name, source in sources.items()
            if name in parts and (not source.optional or source.is_in(folder))
        }


class Released(nn.Module):
    """A placeholder for a part that was dropped from memory. It still has the part's config and dtype."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.config, self.dtype = getattr(part, "config", None), dtype_of(part)


class Parts(dict[str, nn.Module]):
    """The loaded parts of a base by name: "denoiser", "vae", "text_encoder", and for some "text_encoder_2" and "_3".

    Attributes:
        device: where parts compute. `place` moves those there that are needed; others can wait in the CPU's memory.
        keep_released: released parts stay in the CPU's memory, instead of being loaded again from the disk.
    """

    def __init__(self, modules: Mapping[str, nn.Module], read: Callable[[str], nn.Module]) -> None:
        """`read` loads the part with a given name again."""
        super().__init__(modules)
        self._read = read
        self.device = torch.device("cpu")
        self.keep_released = False

    def replaced_by(self, modules: Mapping[str, nn.Module]) -> Parts:
        """Other modules with the same settings and on the same device."""
        other = Parts(modules, self._read)
        other.device, other.keep_released = self.device, self.keep_released
        return other

    def dtype(self, name: str) -> torch.dtype:
        """A part's dtype, even while it is released."""
        return dtype_of(self[name])

    def to(self, device: torch.device | str) -> None:
        """Moves every part to `device`, where they compute from now on."""
        self.device = torch.device(device)
        self.place(list(self))

    def place(self, parts: Sequence[str]) -> None:
        """Moves `parts` to the device and all others to the CPU's memory, so that T5 and Flux, for example, need not
        be on the GPU together."""
        for name, part in self.items():
            if name not in parts:
                part.to("cpu")
        for name in parts:
            self[name].to(self.device)

    def release(self, parts: Sequence[str]) -> None:
        """Removes frozen parts that are no longer needed from the device, and from the CPU's memory too unless
        `keep_released`. `restore` brings them back."""
        for name in parts:
            if self.keep_released:
                self[name].to("cpu")
            elif not isinstance(self[name], Released):
                self[name] = Released(self[name])
        empty_cache()

    def restore(self, parts: Sequence[str] | None = None) -> None:
        """Loads released parts (None: all) again."""
        for name in self if parts is None else parts:
            if isinstance(self[name], Released):
                self[name] = self._read(name)

    def fit(self) -> bool:
        """Whether all parts fit on the device together, with a tenth of its memory left for the images."""
        if self.device.type != "cuda":
            return True
        tensors = [p for part in self.values() for p in part.parameters()]
        missing = sum(p.numel() * p.element_size() for p in tensors if p.device.type == "cpu")
        free, whole = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return missing + whole / 10 <= free + unused


def dtype_of(part: nn.Module) -> torch.dtype:
    if isinstance(part, Released):
        return part.dtype
    return next((weight.dtype for weight in part.parameters()), torch.float32)
