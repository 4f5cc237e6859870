"""A part of a base as its structure alone, whose weights are read block by block when they are cut into shards.

So no device ever holds the whole part: a model that is larger than one of them can train.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from finetune.core.errors import BadInput
from finetune.families.parts import PartSource


class Hollow:
    """The model of a part without its weights.

    Attributes:
        module: its weights have shapes and dtypes, but take no memory. Until `fill` they are zeros, so that layers can
            be added to it (their own weights are real) but nothing can be computed with it.
    """

    def __init__(self, source: PartSource, base: Path, dtype: torch.dtype) -> None:
        """Raises:
        BadInput: the files of the weights do not hold exactly what the model has.
        """
        self.folder = base / source.folder
        with torch.device("meta"):
            self.module = source.skeleton(base).requires_grad_(False).eval()
        self._files = _files(self.folder)
        self._refuse_others()
        self._names: dict[nn.Parameter, str] = {}
        for path, module in self.module.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                still = nn.Parameter(torch.zeros((), dtype=dtype).expand(parameter.shape), requires_grad=False)
                setattr(module, name, still)
                self._names[still] = f"{path}.{name}".lstrip(".")
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, self._read(f"{path}.{name}".lstrip(".")).to(buffer.dtype))

    def fill(self, module: nn.Module) -> None:
        """Reads the weights of a module inside the part, those that it has not read yet."""
        for parameter in module.parameters():
            name = self._names.pop(parameter, None)
            if name is not None:
                parameter.data = self._read(name).to(parameter.dtype)

    def _read(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as held:
            tensor: Tensor = held.get_tensor(name)
        return tensor

    def _refuse_others(self) -> None:
        every = (*self.module.named_parameters(), *self.module.named_buffers())  # also those that no file holds
        wanted = {name: list(value.shape) for name, value in every}
        found: dict[str, list[int]] = {}
        for file in set(self._files.values()):
            with safe_open(file, "pt") as held:
                found |= {name: held.get_slice(name).get_shape() for name in held.keys()}  # noqa: SIM118
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if odd:
            raise BadInput(
                f"the weights in {self.folder} can't be read block by block ({len(odd)} have other names or shapes "
                f"than the model, such as {odd[0]})"
            )


def _files(folder: Path) -> dict[str, Path]:
    """Weight -> the file that holds it, as diffusers chooses: one file, or the several of an index."""
    single = folder / "diffusion_pytorch_model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("diffusion_pytorch_model-*-of-*.safetensors"))
    found: dict[str, Path] = {}
    for file in files:
        with safe_open(file, "pt") as held:
            found |= dict.fromkeys(held.keys(), file)
    return found
