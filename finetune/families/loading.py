"""Shared code of the families that are loaded from diffusers folders: parts, tokenizers, and checks of text widths."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import transformers
from torch import Tensor, nn

from finetune.core.errors import BadInput, PromptCut
from finetune.families.base import Family
from finetune.families.codec import ImageCodec, VaeCodec
from finetune.families.configs import check_configs, well_formed
from finetune.families.drawing import DiffusersDrawing
from finetune.families.parts import Parts, present, skeletons
from finetune.families.schedulers import read_scheduler
from finetune.objectives.schedule import read_schedule

CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LONGEST = 10_000  # characters of a prompt: the longest encoder reads 512 tokens, and a tokenizer's time is quadratic


class DiffusersFamily(Family):
    # the number of tokens that the sampling pipeline passes to a T5 encoder; CLIP's number comes from its tokenizer
    t5_length: ClassVar[int] = 256
    drawing_class: ClassVar[type[DiffusersDrawing]] = DiffusersDrawing

    def __init__(self, folder: Path, dtype: torch.dtype, without: Sequence[str] = (), on_meta: bool = False) -> None:
        check_configs(folder, ["scheduler", *(source.folder for source in self.sources.values())])
        self.folder, self.dtype = folder, dtype
        names = present(self.sources, folder, without)
        if on_meta:
            made = {name: part.to(dtype) for name, part in skeletons(self.sources, folder, names).items()}
        else:
            made = {name: self._load_part(name) for name in names}
        self.parts = Parts(made, self._load_part)
        for part in self.parts.values():
            part.requires_grad_(False).eval()
        self.tokenizers = [] if on_meta else self._tokenizers()
        scheduler = read_scheduler(folder)
        self.schedule = read_schedule(dict(scheduler.config))
        self._check_widths()
        self._check_tokens()
        self.unused_parameters = self._find_unused_parameters()
        self.codec = self._codec()
        self.drawing = self.drawing_class(self, scheduler)
        self.resolution = self.resolution_of(folder)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, without: Sequence[str] = ()) -> Family:
        with well_formed(folder):
            return cls(folder, dtype, without)

    @classmethod
    def on_meta(cls, folder: Path, dtype: torch.dtype, without: Sequence[str] = ()) -> Family:
        with well_formed(folder):
            return cls(folder, dtype, without, on_meta=True)

    def _load_part(self, name: str) -> nn.Module:
        return self.sources[name].load(self.folder, self.dtype)

    def _codec(self) -> ImageCodec:
        return VaeCodec(self.parts)

    def _tokenizers(self) -> list[Any]:
        folders = {name: self.folder / name.replace("text_encoder", "tokenizer") for name in self.text_encoders}
        return [_tokenizer(folder, self.sources[name].kind) for name, folder in folders.items()]

    @classmethod
    def tokenizers_of(cls, folder: Path) -> list[tuple[Any, int]]:
        names = present(cls.sources, folder, ())
        kinds = {name: cls.sources[name].kind for name in names if name.startswith("text_encoder")}
        found = []
        for name, kind in kinds.items():
            tokenizer = _tokenizer(folder / name.replace("text_encoder", "tokenizer"), kind)
            length = int(tokenizer.model_max_length)
            is_t5 = issubclass(kind, transformers.T5EncoderModel)
            found.append((tokenizer, min(length, cls.t5_length) if is_t5 else length))
        return found

    def _find_unused_parameters(self) -> dict[str, tuple[str, ...]]:
        """`Family.unused_parameters`, from the loaded parts."""
        return {}

    @property
    def hidden_width(self) -> int:
        """The width of the text hidden states that the denoiser reads."""
        config = cast(Any, self.parts["denoiser"]).config
        return int(getattr(config, "cross_attention_dim", None) or config.joint_attention_dim)

    def _check_widths(self) -> None:
        """Checks that the denoiser reads the concatenated hidden states of the text encoders."""
        widths = [int(cast(Any, self.parts[name]).config.hidden_size) for name in self.text_encoders]
        if sum(widths) != self.hidden_width:
            raise BadInput(
                f"in {self.folder} the {self.sources['denoiser'].folder} reads text of width {self.hidden_width} but "
                f"the text encoder(s) return {' + '.join(map(str, widths))}: they belong to different bases, use "
                "parts "
                "of one base"
            )

    def _check_tokens(self) -> None:
        """Checks that each token has a row in its encoder's table, and each tokenizer a length and a padding token."""
        for part, tokenizer in zip(self.text_encoders, self.tokenizers, strict=False):
            rows, last = int(cast(Any, self.parts[part]).config.vocab_size), max(tokenizer.get_vocab().values())
            length = tokenizer.model_max_length
            if last >= rows or type(length) is not int or length < 1 or tokenizer.pad_token_id is None:
                raise BadInput(
                    f"the tokenizer of {part} in {self.folder} does not fit it (its last token is {last} of {rows}, "
                    f"its length {length}, its padding {tokenizer.pad_token!r}): fetch the base again"
                )

    def _is_t5(self, index: int) -> bool:
        return issubclass(self.sources[self.text_encoders[index]].kind, transformers.T5EncoderModel)

    def lora_targets(self, part: str, choice: str) -> list[str]:
        """Full paths of the modules that a LoRA of this choice adapts, in a fixed order."""
        if part == "denoiser":
            return self._denoiser_targets(choice)
        dead = self.unused_parameters.get(part, ())
        linear = [path for path, child in self.parts[part].named_modules() if isinstance(child, nn.Linear)]
        return [path for path in linear if path.endswith(CLIP_TARGETS) and not path.startswith(dead)]

    def _denoiser_targets(self, choice: str) -> list[str]:
        raise TypeError("a family names its denoiser's targets")

    def text_length(self, index: int) -> int:
        if not self.tokenizers:  # on the meta device
            config = cast(Any, self.parts[self.text_encoders[index]]).config
            return self.t5_length if self._is_t5(index) else int(config.max_position_embeddings)
        own = int(self.tokenizers[index].model_max_length)
        return min(own, self.t5_length) if self._is_t5(index) else own

    def tokenize(self, index: int, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, length] of the `index`-th tokenizer. Text beyond the length is cut, and a warning shows it.

        Raises:
            BadInput: a prompt has too many characters.
        """
        length = self.text_length(index)
        if not self.tokenizers:
            return torch.zeros(len(prompts), length, dtype=torch.long, device="meta")
        tokenizer = self.tokenizers[index]
        for prompt in prompts:
            if len(prompt) > LONGEST:
                raise BadInput(
                    f"a prompt has {len(prompt):,} characters, {prompt[:40]!r}...: shorten it below {LONGEST:,}"
                )
            whole = tokenizer(prompt, truncation=False)["input_ids"]
            if len(whole) > length:
                cut = tokenizer.decode(whole[length - 1 : -1])
                warnings.warn(
                    f"the prompt {prompt!r} is longer than {length} tokens; {cut!r} is ignored: shorten it",
                    PromptCut,
                    stacklevel=2,
                )
        settings = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        ids: Tensor = tokenizer(list(prompts), **settings)["input_ids"]
        return ids

    def enable_gradient_checkpointing(self, parts: Sequence[str]) -> None:
        for name in parts:
            part: Any = self.parts[name]
            if name == "denoiser":
                part.enable_gradient_checkpointing()
            else:
                part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _tokenizer(folder: Path, encoder: Any) -> Any:
    """The tokenizer of a CLIP or T5 encoder. For CLIP, the vocabulary and the length are checked, because a folder
    with missing files loads with wrong ones and without an error."""
    if not folder.is_dir():
        raise BadInput(f"{folder.parent} has no {folder.name} folder: the base must be a complete diffusers folder")
    if issubclass(encoder, transformers.T5EncoderModel):
        return transformers.T5Tokenizer.from_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    if len(tokenizer) < 256 or tokenizer.model_max_length > 10_000:
        raise BadInput(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and length {tokenizer.model_max_length}: its "
            "vocab.json, merges.txt or tokenizer_config.json is missing"
        )
    return tokenizer
