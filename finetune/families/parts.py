"""What loads: where a base's parts lie in its folder, and the loaded modules with the memory that they take."""

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

    `optional`: a base may lack it, and a recipe may leave it out. `fp32_for_fp16`: it overflows in fp16, and stays in
    fp32 then.
    """

    folder: str
    kind: Any
    optional: bool = False
    fp32_for_fp16: bool = False

    def is_in(self, base: Path) -> bool:
        return (base / self.folder / "config.json").is_file()

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which it is held where the base is held in `dtype`."""
        return torch.float32 if self.fp32_for_fp16 and dtype == torch.float16 else dtype

    def skeleton(self, base: Path) -> nn.Module:
        """The model from its config alone, on torch's default device: random weights, or none on meta."""
        folder = base / self.folder
        read_config(folder, "config.json")  # its limits, before a library goes by it
        with well_formed(folder):
            return self._from_config(folder)

    def _from_config(self, folder: Path) -> nn.Module:
        if issubclass(self.kind, diffusers.ModelMixin):
            module: nn.Module = self.kind.from_config(self.kind.load_config(folder))
        else:
            module = self.kind(self.kind.config_class.from_pretrained(folder))
        return module

    def load(self, base: Path, dtype: torch.dtype) -> nn.Module:
        """The model with its weights, frozen and in eval mode.

        Raises:
            BadInput: it is missing or damaged.
        """
        if not self.is_in(base):
            raise BadInput(f"{base} has no {self.folder}/config.json: the base must be a whole diffusers folder")
        module: Any = load_weights(base / self.folder, self.kind, self.dtype(dtype))
        if issubclass(self.kind, diffusers.AutoencoderKL):
            module.enable_slicing()  # one image at a time: eight of 1024 pixels need no more memory than one
        frozen: nn.Module = module.requires_grad_(False).eval()
        return frozen


PartSources = Mapping[str, PartSource]


def present(sources: PartSources, folder: Path, without: Sequence[str] = ()) -> list[str]:
    """The names of the parts to load: all but those left out, and optional ones that the folder lacks.

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
    """Those of `parts` that the folder has, built from the configs: no weights are read. On another device than meta
    they are random."""
    with torch.device(device):
        return {
            name: source.skeleton(folder)
            for name, source in sources.items()
            if name in parts and (not source.optional or source.is_in(folder))
        }


class Released(nn.Module):
    """Stands where a part was dropped from memory: it still answers for its config and its dtype."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.config, self.dtype = getattr(part, "config", None), dtype_of(part)


class Parts(dict[str, nn.Module]):
    """The loaded parts of a base by name: "denoiser", "vae", "text_encoder", and for some "text_encoder_2" and "_3".

    Attributes:
        device: where they compute. Each is there while it is needed (`place`), and in the CPU's memory otherwise.
        keep_released: parts that are released wait in the CPU's memory, instead of being read again from the disk.
    """

    def __init__(self, modules: Mapping[str, nn.Module], read: Callable[[str], nn.Module]) -> None:
        """`read` loads one part again."""
        super().__init__(modules)
        self._read = read
        self.device = torch.device("cpu")
        self.keep_released = False

    def replaced_by(self, modules: Mapping[str, nn.Module]) -> Parts:
        """Other modules under the same rules, on the same device."""
        other = Parts(modules, self._read)
        other.device, other.keep_released = self.device, self.keep_released
        return other

    def dtype(self, name: str) -> torch.dtype:
        """A part's dtype, also while it is released."""
        return dtype_of(self[name])

    def to(self, device: torch.device | str) -> None:
        """Computes on `device` from now on, and puts every part there."""
        self.device = torch.device(device)
        self.place(list(self))

    def place(self, parts: Sequence[str]) -> None:
        """Puts `parts` on the device and all others into the CPU's memory: T5 need not lie beside Flux."""
        for name, part in self.items():
            if name not in parts:
                part.to("cpu")
        for name in parts:
            self[name].to(self.device)

    def release(self, parts: Sequence[str]) -> None:
        """Frees the device of frozen parts whose work is done, and the CPU's memory too unless `keep_released`;
        `restore` brings them back."""
        for name in parts:
            if self.keep_released:
                self[name].to("cpu")
            elif not isinstance(self[name], Released):
                self[name] = Released(self[name])
        empty_cache()

    def restore(self, parts: Sequence[str] | None = None) -> None:
        """Reads released parts (None: all) again."""
        for name in self if parts is None else parts:
            if isinstance(self[name], Released):
                self[name] = self._read(name)

    def fit(self) -> bool:
        """Whether all can lie on the device together, with a tenth of its memory left for the images."""
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
