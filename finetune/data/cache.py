"""Work of frozen parts, done once: latents and prompt embeddings, kept on disk by the hash of what they are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finetune.batch import Latents
from finetune.data.views import View
from finetune.families.base import Family
from finetune.files import save_tensors

ENCODE_BATCH = 8


class LatentCache:
    """The latent distribution of each view; `fill` once, then `latents` from memory."""

    def __init__(self, folder: Path, base_hash: str, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.base_hash, self.dtype = folder / "latents", base_hash, dtype
        self.held: dict[str, Latents] = {}

    def fill(
        self,
        family: Family,
        views: Sequence[View],
        device: torch.device | str,
        advance: Callable[[int], None] = lambda amount: None,
    ) -> None:
        """Encodes what is not on disk yet. A file that can't be read is made again."""
        todo = []
        for view in views:
            if self._read(view):
                advance(1)
            else:
                todo.append(view)
        for start in range(0, len(todo), ENCODE_BATCH):
            chunk = todo[start : start + ENCODE_BATCH]
            encoded = family.encode_images(torch.stack([view.pixels() for view in chunk]).to(device))
            for view, mean, std in zip(chunk, encoded.mean.cpu(), encoded.std.cpu(), strict=True):
                self.held[view.key] = Latents(mean, std)
                save_tensors(self._file(view), {"mean": mean, "std": std})
            advance(len(chunk))

    def latents(self, view: View) -> Latents:
        """mean and std [C, h, w], float32."""
        return self.held[view.key]

    def _file(self, view: View) -> Path:
        text = f"{view.key}:{self.base_hash}:{self.dtype}"
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, view: View) -> bool:
        tensors = _load(self._file(view))
        if tensors is None or tensors.keys() != {"mean", "std"}:
            return False
        self.held[view.key] = Latents(tensors["mean"], tensors["std"])
        return True


class PromptCache:
    """The frozen encoders' output for each prompt; called like `Family.encode_prompts`."""

    def __init__(self, family: Family, base_hash: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.family, self.base_hash, self.folder, self.dtype = family, base_hash, folder / "prompts", dtype
        self.held: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def fill(self, prompts: Sequence[str]) -> None:
        device = next(self.family.parts["denoiser"].parameters()).device
        for prompt in prompts:
            tensors = _load(self._file(prompt))
            if tensors is None:
                tensors = {name: value[0] for name, value in self.family.encode_prompts([prompt]).items()}
                save_tensors(self._file(prompt), tensors)
            self.held[prompt] = {name: value.to(device) for name, value in tensors.items()}

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        rows = [self.held[prompt] for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _file(self, prompt: str) -> Path:
        name = hashlib.sha256(f"{prompt}\n{self.base_hash}\n{self.dtype}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


def _load(file: Path) -> dict[str, Tensor] | None:
    """A cache file's tensors; None where there is none or it is damaged."""
    if not file.is_file():
        return None
    try:
        return load_file(file)
    except (SafetensorError, OSError):
        return None
