"""Stable Diffusion 1.x and 2.x: one text encoder, and a UNet that reads its last hidden state."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import torch
import transformers
from torch import Tensor, nn

from finetune.batch import Geometry, Latents
from finetune.errors import BadInput
from finetune.families.base import Family
from finetune.families.samplers import make_scheduler
from finetune.families.weights import load_weights
from finetune.objectives import Schedule

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class DiffusersFamily(Family):
    """What the UNet families of diffusers share: loading by part, the VAE, tokenizing and LoRA targets."""

    # part -> (subfolder, class)
    sources: ClassVar[dict[str, tuple[str, Any]]]

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self.parts = {name: self._load_part(name) for name in self.sources}
        self.tokenizers = [
            _tokenizer(folder / name.replace("text_encoder", "tokenizer")) for name in self.text_encoders
        ]
        self.scheduler = _scheduler(folder)
        self.schedule = Schedule.from_config(dict(self.scheduler.config))
        self._check_widths()
        vae, denoiser = cast(Any, self.parts["vae"]).config, cast(Any, self.parts["denoiser"]).config
        self.latent_factor = 2 ** (len(vae.block_out_channels) - 1)
        self.scaling = float(vae.scaling_factor)
        self.resolution = int(denoiser.sample_size) * self.latent_factor

    @property
    def size_multiple(self) -> int:
        """A UNet halves the latents once between two blocks: 64 pixels for SD1 and SD2, 32 for SDXL."""
        blocks = cast(Any, self.parts["denoiser"]).config.block_out_channels
        return self.latent_factor * 2 ** (len(blocks) - 1)

    def _check_widths(self) -> None:
        """The denoiser reads the text encoders' hidden states, side by side."""
        widths = [int(cast(Any, self.parts[name]).config.hidden_size) for name in self.text_encoders]
        wanted = cast(Any, self.parts["denoiser"]).config.cross_attention_dim
        if sum(widths) != wanted:
            raise BadInput(
                f"in {self.folder} the unet reads text of width {wanted} but the text encoder(s) write "
                f"{' + '.join(map(str, widths))}: they are of different bases, put the right ones together"
            )

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> Family:
        return cls(folder, dtype)

    @classmethod
    def skeletons(cls, folder: Path) -> dict[str, nn.Module]:
        with torch.device("meta"):
            return {
                name: _from_config(kind, folder / subfolder)
                for name, (subfolder, kind) in cls.sources.items()
                if name in cls.export_prefix
            }

    def _load_part(self, name: str) -> nn.Module:
        subfolder, kind = self.sources[name]
        if not (self.folder / subfolder / "config.json").is_file():
            raise BadInput(f"{self.folder} has no {subfolder}/config.json: the base must be a whole diffusers folder")
        return load_weights(self.folder / subfolder, kind, self._part_dtype(name)).requires_grad_(False).eval()

    def _part_dtype(self, name: str) -> torch.dtype:
        return self.dtype

    def lora_targets(self, part: str, choice: str) -> list[str]:
        """Full paths of the modules that a LoRA of this choice adapts; deterministic order."""
        module = self.parts[part]
        linear = [path for path, child in module.named_modules() if isinstance(child, nn.Linear)]
        if part.startswith("text_encoder"):
            dead = self.unread.get(part, ())
            return [path for path in linear if path.endswith(TEXT_TARGETS) and not path.startswith(dead)]
        if choice == "attention":
            return [path for path in linear if path.endswith(ATTENTION)]
        inside = [
            path
            for path, child in module.named_modules()
            if isinstance(child, nn.Linear | nn.Conv2d) and (".attentions." in path or path.startswith("attentions."))
        ]
        if choice == "all-linear":
            return inside
        convolutions = [
            path
            for path, child in module.named_modules()
            if isinstance(child, nn.Linear | nn.Conv2d) and (".resnets." in path or "samplers." in path)
        ]
        return [*inside, *convolutions]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Latents:
        vae: Any = self.parts["vae"]
        latent = vae.encode(pixels.to(vae.dtype)).latent_dist
        return Latents(latent.mean.float() * self.scaling, latent.std.float() * self.scaling)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        vae: Any = self.parts["vae"]
        return vae.decode((latents / self.scaling).to(vae.dtype)).sample.float()

    def tokenize(self, index: int, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, length] of the `index`-th tokenizer; what does not fit is cut, and a warning names it."""
        tokenizer = self.tokenizers[index]
        length = tokenizer.model_max_length
        for prompt in prompts:
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
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def restore(self, parts: Sequence[str], device: torch.device | str = "cpu") -> None:
        for name in parts:
            if isinstance(self.parts[name], nn.Identity):
                self.parts[name] = self._load_part(name).to(device)

    def enable_gradient_checkpointing(self, parts: Sequence[str]) -> None:
        for name in parts:
            part: Any = self.parts[name]
            if name == "denoiser":
                part.enable_gradient_checkpointing()
            else:
                part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def pipeline(self, sampler: str | None = None) -> Any:
        self.restore(list(self.parts), next(self.parts["denoiser"].parameters()).device)
        pipeline = getattr(diffusers, self.pipeline_class)(
            **self._pipeline_parts(make_scheduler(self.scheduler, sampler))
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _pipeline_parts(self, scheduler: Any) -> dict[str, Any]:
        raise TypeError("a family names its pipeline's parts")


class StableDiffusion1(DiffusersFamily):
    name = "sd1"
    pipeline_class = "StableDiffusionPipeline"
    export_prefix: ClassVar = {"denoiser": "lora_unet", "text_encoder": "lora_te"}
    sources: ClassVar = {
        "denoiser": ("unet", diffusers.UNet2DConditionModel),
        "vae": ("vae", diffusers.AutoencoderKL),
        "text_encoder": ("text_encoder", transformers.CLIPTextModel),
    }
    linear_projection = False

    @classmethod
    def matches(cls, model_index: dict[str, Any], denoiser_config: dict[str, Any]) -> bool:
        linear = bool(denoiser_config.get("use_linear_projection", False))
        channels = (
            denoiser_config.get("in_channels", 4),
            denoiser_config.get("out_channels", 4),
        )  # old configs omit them
        plain = model_index.get("_class_name") == cls.pipeline_class and channels[0] == channels[1]
        return plain and linear == cls.linear_projection

    @classmethod
    def write_tiny(cls, folder: Path, seed: int = 0) -> None:
        from finetune.families.tiny import write_sd

        write_sd(folder, seed, linear_projection=cls.linear_projection)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """{"hidden": [B, length, width]}: the encoder's last hidden state."""
        encoder: Any = self.parts["text_encoder"]
        ids = self.tokenize(0, prompts).to(encoder.device)
        return {"hidden": encoder(ids).last_hidden_state}

    def predict(
        self, noisy: Tensor, timesteps: Tensor, cond: dict[str, Tensor], geometry: Sequence[Geometry]
    ) -> Tensor:
        denoiser: Any = self.parts["denoiser"]
        dtype = denoiser.conv_in.weight.dtype  # diffusers' own `.dtype` walks all modules: 3 % of a small step
        return denoiser(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=cond["hidden"].to(dtype),
            return_dict=False,
        )[0]

    def _pipeline_parts(self, scheduler: Any) -> dict[str, Any]:
        return {
            "vae": self.parts["vae"],
            "text_encoder": self.parts["text_encoder"],
            "tokenizer": self.tokenizers[0],
            "unet": self.parts["denoiser"],
            "scheduler": scheduler,
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }


class StableDiffusion2(StableDiffusion1):
    """The same parts; told by the linear projections round its attention blocks."""

    name = "sd2"
    linear_projection = True


def _from_config(kind: Any, folder: Path) -> nn.Module:
    if issubclass(kind, diffusers.ModelMixin):
        return kind.from_config(kind.load_config(folder))
    return kind(transformers.CLIPTextConfig.from_pretrained(folder))


def _tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer, with the two lengths checked that a wrong file layout silently breaks."""
    if not folder.is_dir():
        raise BadInput(f"{folder.parent} has no {folder.name} folder: the base must be a whole diffusers folder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    if len(tokenizer) < 256 or tokenizer.model_max_length > 10_000:
        raise BadInput(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and length {tokenizer.model_max_length}: its "
            "vocab.json, merges.txt or tokenizer_config.json is missing"
        )
    return tokenizer


def _scheduler(folder: Path) -> Any:
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise BadInput(f"{folder} has no scheduler/scheduler_config.json: it tells what the base predicts")
    config = diffusers.DDIMScheduler.load_config(folder, subfolder="scheduler")
    kind = getattr(diffusers, config.get("_class_name", "DDIMScheduler"), None)
    if kind is None:
        raise BadInput(f"{file} names {config['_class_name']!r}, which is no scheduler of diffusers: mend it")
    Schedule.from_config(dict(config))  # refuses what is not supported, where diffusers would raise
    return kind.from_pretrained(folder, subfolder="scheduler")
