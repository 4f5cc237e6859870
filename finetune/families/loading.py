"""What all families share that are loaded from diffusers folders: parts, VAE, tokenizing, release and restore."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import torch
import transformers
from torch import Tensor, nn

from finetune.core.batch import Latents
from finetune.core.devices import empty_cache
from finetune.core.errors import BadInput
from finetune.families.base import Family
from finetune.families.configs import check_configs, read_config, well_formed
from finetune.families.schedulers import make_scheduler, read_scheduler
from finetune.families.weights import load_weights
from finetune.objectives.schedule import read_schedule

CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LONGEST = 10_000  # characters of a prompt: the longest encoder reads 512 tokens, and a tokenizer's time is quadratic


class DiffusersFamily(Family):
    # the longest text that the sampling pipeline gives to a T5 encoder; CLIP's length is its tokenizer's
    t5_length: ClassVar[int] = 256

    def __init__(self, folder: Path, dtype: torch.dtype, without: Sequence[str] = (), on_meta: bool = False) -> None:
        check_configs(folder, ["scheduler", *(subfolder for subfolder, _ in self.sources.values())])
        self.folder, self.dtype = folder, dtype
        present = self._present(without)
        if on_meta:
            self.parts = {name: part.to(dtype) for name, part in self.skeletons(folder, present).items()}
        else:
            self.parts = {name: self._load_part(name) for name in present}
        for part in self.parts.values():
            part.requires_grad_(False).eval()
        self.tokenizers = [] if on_meta else self._tokenizers()
        self.scheduler = read_scheduler(folder)
        self.schedule = read_schedule(dict(self.scheduler.config))
        self._check_widths()
        self._check_tokens()
        self.unused_parameters = self._find_unused_parameters()
        vae = cast(Any, self.parts["vae"]).config
        self.latent_factor = 2 ** (len(vae.block_out_channels) - 1)
        self.latent_channels = int(vae.latent_channels)
        self.scaling, self.offset = float(vae.scaling_factor), float(getattr(vae, "shift_factor", None) or 0.0)
        self.resolution = self.resolution_of(folder)

    def _tokenizers(self) -> list[Any]:
        folders = {name: self.folder / name.replace("text_encoder", "tokenizer") for name in self.text_encoders}
        return [_tokenizer(folder, self.sources[name][1]) for name, folder in folders.items()]

    def _find_unused_parameters(self) -> dict[str, tuple[str, ...]]:
        """`Family.unread`, from the loaded parts."""
        return {}

    def _present(self, without: Sequence[str]) -> list[str]:
        odd = [name for name in without if name not in self.optional]
        if odd:
            can = f"only {', '.join(self.optional)} can" if self.optional else "all parts are needed"
            raise BadInput(f"base.without has {odd[0]!r}, which {self.name} can't do without ({can}): remove it")
        lacking = [name for name in self.optional if not self.is_in(self.folder, name)]
        return [name for name in self.sources if name not in (*without, *lacking)]

    @classmethod
    def is_in(cls, folder: Path, part: str) -> bool:
        return (folder / cls.sources[part][0] / "config.json").is_file()

    @property
    def hidden_width(self) -> int:
        """The width of text that the denoiser reads."""
        config = cast(Any, self.parts["denoiser"]).config
        return int(getattr(config, "cross_attention_dim", None) or config.joint_attention_dim)

    def _check_widths(self) -> None:
        """The denoiser reads the text encoders' hidden states, side by side."""
        widths = [int(cast(Any, self.parts[name]).config.hidden_size) for name in self.text_encoders]
        if sum(widths) != self.hidden_width:
            raise BadInput(
                f"in {self.folder} the {self.sources['denoiser'][0]} reads text of width {self.hidden_width} but the "
                f"text encoder(s) write {' + '.join(map(str, widths))}: they are of different bases, put the right "
                "ones together"
            )

    def _check_tokens(self) -> None:
        """Each token has a row in its encoder's table, and each tokenizer a length and something to fill it with."""
        for part, tokenizer in zip(self.text_encoders, self.tokenizers, strict=False):
            rows, last = int(cast(Any, self.parts[part]).config.vocab_size), max(tokenizer.get_vocab().values())
            length = tokenizer.model_max_length
            if last >= rows or type(length) is not int or length < 1 or tokenizer.pad_token_id is None:
                raise BadInput(
                    f"the tokenizer of {part} in {self.folder} does not fit it (its last token is {last} of {rows}, "
                    f"its length {length}, its padding {tokenizer.pad_token!r}): fetch the base again"
                )

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype, without: Sequence[str] = ()) -> Family:
        with well_formed(folder):
            return cls(folder, dtype, without)

    @classmethod
    def on_meta(cls, folder: Path, dtype: torch.dtype, without: Sequence[str] = ()) -> Family:
        with well_formed(folder):
            return cls(folder, dtype, without, on_meta=True)

    @classmethod
    def skeletons(
        cls, folder: Path, parts: Sequence[str] | None = None, device: torch.device | str = "meta"
    ) -> dict[str, nn.Module]:
        wanted = cls.export_prefix if parts is None else parts
        with torch.device(device):
            return {
                name: _from_config(kind, folder / subfolder)
                for name, (subfolder, kind) in cls.sources.items()
                if name in wanted and (name not in cls.optional or cls.is_in(folder, name))
            }

    def _load_part(self, name: str) -> nn.Module:
        subfolder, kind = self.sources[name]
        if not self.is_in(self.folder, name):
            raise BadInput(f"{self.folder} has no {subfolder}/config.json: the base must be a whole diffusers folder")
        part: Any = load_weights(self.folder / subfolder, kind, self._part_dtype(name))
        if name == "vae":
            part.enable_slicing()  # a picture at a time: eight of 1024 pixels need no more memory than one
        return part.requires_grad_(False).eval()

    def _is_t5(self, index: int) -> bool:
        return issubclass(self.sources[self.text_encoders[index]][1], transformers.T5EncoderModel)

    def _part_dtype(self, name: str) -> torch.dtype:
        return self.dtype

    def lora_targets(self, part: str, choice: str) -> list[str]:
        """Full paths of the modules that a LoRA of this choice adapts; deterministic order."""
        if part == "denoiser":
            return self._denoiser_targets(choice)
        dead = self.unused_parameters.get(part, ())
        linear = [path for path, child in self.parts[part].named_modules() if isinstance(child, nn.Linear)]
        return [path for path in linear if path.endswith(CLIP_TARGETS) and not path.startswith(dead)]

    def _denoiser_targets(self, choice: str) -> list[str]:
        raise TypeError("a family names its denoiser's targets")

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Latents:
        vae: Any = self.parts["vae"]
        latent = vae.encode(pixels.to(vae.dtype)).latent_dist
        return Latents((latent.mean.float() - self.offset) * self.scaling, latent.std.float() * self.scaling)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        vae: Any = self.parts["vae"]
        return vae.decode((latents / self.scaling + self.offset).to(vae.dtype)).sample.float()

    def text_length(self, index: int) -> int:
        if not self.tokenizers:  # on the meta device
            config = cast(Any, self.parts[self.text_encoders[index]]).config
            return self.t5_length if self._is_t5(index) else int(config.max_position_embeddings)
        own = int(self.tokenizers[index].model_max_length)
        return min(own, self.t5_length) if self._is_t5(index) else own

    def tokenize(self, index: int, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, length] of the `index`-th tokenizer; what does not fit is cut, and a warning names it."""
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
                    f"the prompt {prompt!r} is longer than {length} tokens; {cut!r} is not read: shorten it",
                    stacklevel=2,
                )
        return tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")[
            "input_ids"
        ]

    def release(self, parts: Sequence[str]) -> None:
        for name in parts:
            self.parts[name] = nn.Identity()
        empty_cache()

    def restore(self, parts: Sequence[str]) -> None:
        for name in parts:
            if isinstance(self.parts[name], nn.Identity):
                self.parts[name] = self._load_part(name)

    def enable_gradient_checkpointing(self, parts: Sequence[str]) -> None:
        for name in parts:
            part: Any = self.parts[name]
            if name == "denoiser":
                part.enable_gradient_checkpointing()
            else:
                part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def check_sampler(self, sampler: str) -> None:
        make_scheduler(self.scheduler, sampler)

    def pipeline(self, sampler: str | None = None) -> Any:
        self.restore(list(self.parts))
        pipeline = getattr(diffusers, self._pipeline_name())(
            **self._pipeline_parts(), scheduler=make_scheduler(self.scheduler, sampler), **self._pipeline_extras()
        )
        pipeline.set_progress_bar_config(disable=True)
        if self._fits():
            self.place(list(self.parts))
        else:
            self.place([])
            pipeline.enable_model_cpu_offload(device=self.device)
        return pipeline

    def _fits(self) -> bool:
        """Whether all parts can lie on the device together, with a tenth of its memory left for the images."""
        if self.device.type != "cuda":
            return True
        tensors = [p for part in self.parts.values() for p in part.parameters()]
        missing = sum(p.numel() * p.element_size() for p in tensors if p.device.type == "cpu")
        free, whole = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return missing + whole / 10 <= free + unused

    def _pipeline_name(self) -> str:
        return self.pipeline_class

    def _pipeline_parts(self) -> dict[str, Any]:
        """Models and tokenizers by the names of the pipeline's arguments: those of the folder; None if left out."""
        held: dict[str, Any] = {self.sources[name][0]: self.parts.get(name) for name in self.sources}
        names = [name for name in self.sources if name.startswith("text_encoder")]
        tokenizers = dict(zip(self.text_encoders, self.tokenizers, strict=True))
        return held | {name.replace("text_encoder", "tokenizer"): tokenizers.get(name) for name in names}

    def _pipeline_extras(self) -> dict[str, Any]:
        return {}


def _from_config(kind: Any, folder: Path) -> nn.Module:
    read_config(folder, "config.json")  # its limits, before a library goes by it
    with well_formed(folder):
        if issubclass(kind, diffusers.ModelMixin):
            return kind.from_config(kind.load_config(folder))
        return kind(kind.config_class.from_pretrained(folder))


def _tokenizer(folder: Path, encoder: Any) -> Any:
    """The tokenizer of a CLIP or T5 encoder; for CLIP two lengths are checked that a wrong layout silently breaks."""
    if not folder.is_dir():
        raise BadInput(f"{folder.parent} has no {folder.name} folder: the base must be a whole diffusers folder")
    if issubclass(encoder, transformers.T5EncoderModel):
        return transformers.T5Tokenizer.from_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    if len(tokenizer) < 256 or tokenizer.model_max_length > 10_000:
        raise BadInput(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and length {tokenizer.model_max_length}: its "
            "vocab.json, merges.txt or tokenizer_config.json is missing"
        )
    return tokenizer
