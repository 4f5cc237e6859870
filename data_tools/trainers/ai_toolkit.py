"""ai-toolkit's YAML (or JSON): the first process of `config.process`.

Names and defaults: ostris/ai-toolkit, toolkit/config_modules.py (NetworkConfig, TrainConfig, DatasetConfig, ...) and
config/examples/train_lora_flux_24gb.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.trainers.carried import (
    Carried,
    Rule,
    as_text,
    choice,
    flat,
    min_snr,
    number,
    one_of,
    optimiser,
    positive,
    precision,
    resolution,
    run_name,
    schedule,
    truth,
    whole,
)
from finetune.core.errors import BadInput

STEPS, LR = 1000, 1e-6  # defaults
NETWORKS = {"lora": "lora", "locon": "lora", "lokr": "lokr", "dora": "dora"}


RULES = {
    "name": Rule("run.name", run_name), "model.name_or_path": Rule("base.source", as_text),
    "network.type": Rule("method.kind", one_of(NETWORKS)), "network.linear": Rule("method.rank", whole),
    "network.rank": Rule("method.rank", whole), "network.linear_alpha": Rule("method.alpha", positive),
    "network.alpha": Rule("method.alpha", positive), "network.dropout": Rule("method.dropout", number),
    "save.save_every": Rule("run.checkpoint_every", whole), "save.max_step_saves_to_keep": Rule("run.keep", whole),
    "train.batch_size": Rule("run.batch_size", whole), "train.steps": Rule("run.steps", whole),
    "train.lr": Rule("optim.lr", positive), "train.unet_lr": Rule("optim.lr", positive),
    "train.text_encoder_lr": Rule("optim.text_lr", positive), "train.optimizer": Rule("optim.kind", optimiser),
    "train.optimizer_params.weight_decay": Rule("optim.weight_decay", number),
    "train.lr_scheduler": Rule("optim.schedule", schedule), "train.dtype": Rule("run.precision", precision),
    "train.gradient_checkpointing": Rule("run.gradient_checkpointing", truth),
    "train.max_grad_norm": Rule("optim.max_grad_norm", number),
    "train.noise_offset": Rule("objective.noise_offset", number),
    "train.min_snr_gamma": Rule("objective.weighting", min_snr),
    "sample.sample_every": Rule("sample.every", whole), "sample.guidance_scale": Rule("sample.guidance", number),
    "sample.sample_steps": Rule("sample.steps", whole), "sample.seed": Rule("sample.seed", whole),
    "sample.neg": Rule("sample.negative", as_text),
}  # fmt: skip
FILES = "exports, checkpoints and caches of a run have places of their own"
MODEL = "the base's own config says it"
REASONS = {
    "training_folder": FILES, "device": "the best one is taken (CUDA_VISIBLE_DEVICES chooses)", "save.dtype": FILES,
    "save.push_to_hub": "nothing is uploaded", "train.noise_scheduler": MODEL, "model.is_flux": MODEL,
    "model.is_xl": MODEL, "model.is_v2": MODEL, "model.is_v3": MODEL, "model.arch": MODEL,
    "model.quantize": "`finetune plan` says what fits", "model.low_vram": "`finetune plan` says what fits",
    "train.train_unet": "method.parts says what trains", "sample.sampler": "choose sample.sampler",
    "sample.width": "images have the size of training", "sample.height": "images have the size of training",
    "sample.walk_seed": "each image has a seed of its own", "type": "a recipe always trains",
    "train.disable_sampling": "sample.every=0 draws none while training",
}  # fmt: skip
OF_DATASET = {
    "caption_dropout_rate": Rule("data.caption_dropout", number), "shuffle_tokens": Rule("data.shuffle_tags", truth),
    "keep_tokens": Rule("data.keep_tags", whole), "flip_x": Rule("data.flip", truth),
    "random_crop": Rule("data.crop", choice("random", "center")),
    "buckets": Rule("data.shape", choice("buckets", "square")),
    "alpha_mask": Rule("data.masks", choice("alpha", "none")),
    "mask_min_value": Rule("data.mask_floor", number),
}  # fmt: skip
DATASET_REASONS = {
    "caption_ext": "captions are read from NAME.txt and NAME.caption: rename other ones",
    "cache_latents": "latents are always cached", "cache_latents_to_disk": "latents are always cached on the disk",
    "token_dropout_rate": "tags are shuffled, not dropped at random",
    "is_reg": "class images are prior.folder of a recipe", "default_caption": "write it into data.templates",
    "mask_path": "masks lie beside photos as NAME.mask.png, or in masks/NAME.png",
    "bucket_tolerance": "in pixels there; data.bucket_tolerance is a share",
}  # fmt: skip


def of_ai_toolkit(settings: dict[str, Any], carried: Carried) -> None:
    """Carries the first process over.

    Raises:
        BadInput: there is no process.
    """
    config = settings.get("config") or {}
    processes = config.get("process") or []
    if not processes or not isinstance(processes[0], dict):
        raise BadInput("config.process is empty: give a config of ai-toolkit with a process that trains")
    for key, value in settings.items():
        if key not in ("config", "job"):
            carried.leave(key, value, "notes for people")
    for index, other in enumerate(processes[1:], 1):
        carried.leave(f"process[{index}]", other, "a recipe is one run")
    given = dict(processes[0])
    given["name"] = config.get("name", given.get("name"))
    datasets = list(given.pop("datasets", None) or [])
    trigger = given.pop("trigger_word", None)
    _several(given, carried)
    carried.carry(dict(flat(given)), RULES, REASONS)
    _put_datasets(datasets, trigger, carried)
    _prompts(given, trigger, carried)


def _several(given: dict[str, Any], carried: Carried) -> None:
    """What several settings say together."""
    train = dict(given.get("train") or {})
    train.setdefault("lr", LR)
    train.setdefault("steps", STEPS)
    parts = whole(train.pop("gradient_accumulation_steps", None) or train.pop("gradient_accumulation", None) or 1)
    if parts > 1:
        size = whole(train.pop("batch_size", 1))
        carried.put("train.gradient_accumulation_steps", parts, "run.accumulate", parts)
        carried.put("train.batch_size", size, "run.batch_size", size * parts, "all photos of a step")
    texts, network_given = bool(train.pop("train_text_encoder", False)), given.get("network")
    found = ["denoiser", *(["text_encoders"] if texts else [])]
    carried.put("train.train_text_encoder", texts, "method.parts", found)
    if not network_given:
        carried.put("network", None, "method.kind", "full", "without a network all weights train")
    ema = train.pop("ema_config", None)
    if isinstance(ema, Mapping) and ema.get("use_ema"):
        carried.put("train.ema_config", dict(ema), "run.ema", number(ema.get("ema_decay", 0.999)))
    elif ema:
        carried.leave("train.ema_config", dict(ema), "use_ema is off")
    given["train"] = train


def _put_datasets(datasets: list[dict[str, Any]], trigger: Any, carried: Carried) -> None:
    if not datasets:
        return
    first = dict(datasets[0])
    named = first.pop("folder_path", None) or first.pop("dataset_path", None) or ""
    folder = carried.folder(named)
    why = "" if folder.is_dir() else "it is not there: correct it"
    carried.put("datasets[0].folder_path", named, "data.photos", str(folder), why)
    word = trigger or first.pop("trigger_word", None)
    if word:
        carried.put("trigger_word", word, "data.token", str(word))
        carried.put("trigger_word", word, "data.token_pieces", 32, "other trainers allow a token of any pieces")
        carried.put("trigger_word", word, "data.trigger", ", {token}", "added to captions without it; there in front")
    carried.values["data"]["templates"] = ["{token}"]
    first.setdefault("buckets", True)
    sizes = first.pop("resolution", 512)
    sizes = sizes if isinstance(sizes, list) else [sizes]
    carried.put("datasets[0].resolution", sizes, "data.resolution", max(resolution(size) for size in sizes))
    if len(sizes) > 1:
        carried.leave("datasets[0].resolution", sorted(sizes)[:-1], "a recipe has one resolution, the largest")
    many = first.pop("num_repeats", 1)
    if many != 1:
        carried.leave("datasets[0].num_repeats", many, "of one folder repeats only make epochs longer")
    weight = number(first.pop("loss_multiplier", 1.0))
    if weight != 1:
        carried.put("datasets[0].loss_multiplier", weight, "data.weights", {"*": weight})
    carried.carry(dict(flat(first)), OF_DATASET, DATASET_REASONS)
    for index, other in enumerate(datasets[1:], 1):
        why = "a further folder: move its photos to the first one, or give it a token of its own in data.subjects"
        carried.leave(f"datasets[{index}]", other, why)
    if not carried.at("data.shuffle_tags") and carried.at("data.keep_tags") is not None:
        carried.drop("data.keep_tags", "it only counts with shuffle_tokens")


def _prompts(given: Mapping[str, Any], trigger: Any, carried: Carried) -> None:
    """Prompts, with the trigger word as {token}; newer files have a list of samples."""
    sample = given.get("sample") or {}
    samples = [each.get("prompt") for each in sample.get("samples") or [] if isinstance(each, dict)]
    prompts = [str(text) for text in sample.get("prompts") or samples if text]
    if not prompts:
        return
    words = [text.replace("[trigger]", "{token}") for text in prompts]
    if trigger:
        words = [text.replace(str(trigger), "{token}") for text in words]
    carried.lines = [line for line in carried.lines if line.key not in ("sample.prompts", "sample.samples")]
    carried.put("sample.prompts", prompts, "sample.prompts", words)
