"""Flags of diffusers' DreamBooth and text-to-image scripts, from a shell line or a file of them.

Names and defaults: huggingface/diffusers, examples/dreambooth/train_dreambooth_lora_sdxl.py `parse_args`, and its
siblings of the other bases.
"""

from __future__ import annotations

import re
from typing import Any

from data_tools.trainers.carried import (
    Carried,
    Rule,
    as_text,
    choice,
    epochs_to_steps,
    images_in,
    min_snr,
    number,
    optimiser,
    positive,
    precision,
    resolution,
    run_name,
    schedule,
    truth,
    whole,
)
from finetune.core.reading import read_utf8
from finetune.data import captions

RANK, BATCH, WARMUP, EPOCHS, CLASS_IMAGES = 4, 4, 500, 1, 100  # defaults
ARTICLES = ("a", "an", "the")
RULES = {
    "pretrained_model_name_or_path": Rule("base.source", as_text), "revision": Rule("base.revision", as_text),
    "output_dir": Rule("run.name", lambda value: run_name(str(value).replace("\\", "/").rstrip("/").split("/")[-1])),
    "seed": Rule("run.seed", whole), "resolution": Rule("data.resolution", resolution),
    "center_crop": Rule("data.crop", choice("center", "random")),
    "random_flip": Rule("data.flip", truth), "train_batch_size": Rule("run.batch_size", whole),
    "max_train_steps": Rule("run.steps", whole), "checkpointing_steps": Rule("run.checkpoint_every", whole),
    "checkpoints_total_limit": Rule("run.keep", whole),
    "gradient_checkpointing": Rule("run.gradient_checkpointing", truth),
    "learning_rate": Rule("optim.lr", positive), "text_encoder_lr": Rule("optim.text_lr", positive),
    "lr_scheduler": Rule("optim.schedule", schedule), "lr_warmup_steps": Rule("optim.warmup", whole),
    "optimizer": Rule("optim.kind", optimiser), "adam_weight_decay": Rule("optim.weight_decay", number),
    "adam_epsilon": Rule("optim.eps", positive), "max_grad_norm": Rule("optim.max_grad_norm", number),
    "mixed_precision": Rule("run.precision", precision), "rank": Rule("method.rank", whole),
    "lora_alpha": Rule("method.alpha", positive), "lora_dropout": Rule("method.dropout", number),
    "snr_gamma": Rule("objective.weighting", min_snr),
    "noise_offset": Rule("objective.noise_offset", number), "caption_column": Rule("data.caption_column", as_text),
    "image_column": Rule("data.image_column", as_text),
    "input_perturbation": Rule("objective.input_perturbation", number),
}  # fmt: skip
REASONS = {
    "hub_token": "a secret", "push_to_hub": "nothing is uploaded", "logging_dir": "RUN has it",
    "report_to": "run.trackers=[tensorboard] or [wandb] writes it", "allow_tf32": "only how it is computed",
    "enable_xformers_memory_efficient_attention": "only how it is computed", "variant": "the files are found",
    "dataloader_num_workers": "data.workers, by the number of cores", "local_rank": "the launcher says it",
    "num_validation_images": "sample.count", "validation_epochs": "sample.every, in steps",
    "repeats": "of one folder repeats only make epochs longer", "cache_latents": "latents are always cached",
    "scale_lr": "write the scaled rate into optim.lr", "sample_batch_size": "prior.batch_size",
    "resume_from_checkpoint": "`finetune resume RUN` goes on", "prior_generation_precision": "run.precision",
    "pretrained_vae_model_name_or_path": "the base's own VAE is used: put the other into its folder",
    "script": "the recipe's kind of training",
}  # fmt: skip


def of_diffusers(settings: dict[str, Any], carried: Carried) -> None:
    """Carries the flags over. What they leave out has the scripts' default, where ours is another."""
    given = dict(settings)
    script = str(given.get("script", ""))
    lora = "lora" in script or "rank" in given
    carried.put("script", script, "method.kind", "lora" if lora else "full")
    given.pop("script", None)
    if lora:
        given.setdefault("rank", RANK)
    given.setdefault("lr_warmup_steps", WARMUP)
    given.setdefault("train_batch_size", BATCH)
    given.setdefault("center_crop", False)
    _several(given, carried)
    prompts = given.pop("instance_prompt", None), given.pop("class_prompt", None)
    preserved = _prior(given, carried)
    epochs = whole(given.pop("num_train_epochs", EPOCHS))
    named = (
        given.pop("instance_data_dir", None) or given.pop("train_data_dir", None) or given.pop("dataset_name", None)
    )
    validation = given.pop("validation_prompt", None)
    _betas(given, carried)
    carried.carry(given, RULES, REASONS)
    _photos(named, "dataset_name" in settings, carried)
    _words(*prompts, preserved=preserved, validation=validation, carried=carried)
    if carried.at("run.steps") is None:
        _epochs(epochs, named, carried)
    if not lora:
        for key in ("method.rank", "method.alpha"):
            if carried.at(key) is not None:
                carried.drop(key, "only a LoRA has it")


def _several(given: dict[str, Any], carried: Carried) -> None:
    texts = truth(given.pop("train_text_encoder", False))
    carried.put("train_text_encoder", texts, "method.parts", ["denoiser", *(["text_encoders"] if texts else [])])
    if truth(given.pop("use_8bit_adam", False)):
        given.pop("optimizer", None)
        carried.put("use_8bit_adam", True, "optim.kind", "adamw8bit")
    parts = whole(given.pop("gradient_accumulation_steps", 1))
    if parts > 1:
        size = whole(given.pop("train_batch_size"))
        carried.put("gradient_accumulation_steps", parts, "run.accumulate", parts)
        carried.put("train_batch_size", size, "run.batch_size", size * parts, "all photos of a step")


def _betas(given: dict[str, Any], carried: Carried) -> None:
    if "adam_beta1" in given or "adam_beta2" in given:
        pair = [number(given.pop("adam_beta1", 0.9)), number(given.pop("adam_beta2", 0.999))]
        carried.put("adam_beta1, adam_beta2", pair, "optim.betas", pair)


def _photos(named: Any, of_hub: bool, carried: Carried) -> None:
    if not named:
        return
    folder = carried.folder(named)
    if of_hub and not folder.exists():
        carried.put("dataset_name", named, "data.photos", f"hf:{named}")
        return
    carried.put("instance_data_dir", named, "data.photos", str(folder), "" if folder.is_dir() else "it is not there")


def _prior(given: dict[str, Any], carried: Carried) -> bool:
    """Class images, if they are asked for."""
    asked, folder = truth(given.pop("with_prior_preservation", False)), given.pop("class_data_dir", None)
    weight, count = given.pop("prior_loss_weight", 1.0), given.pop("num_class_images", CLASS_IMAGES)
    if not asked:
        if folder:
            carried.leave("class_data_dir", folder, "it only counts with --with_prior_preservation")
        return False
    carried.values["prior"] = {"kind": "class_images", "caption_dropout": 0.0, "flip": False}
    carried.put("with_prior_preservation", True, "prior.kind", "class_images")
    carried.put("prior_loss_weight", weight, "prior.weight", number(weight))
    there = images_in(carried.folder(folder)) if folder else 0
    carried.put("num_class_images", count, "prior.count", there or whole(count))
    if there:
        carried.put("class_data_dir", folder, "prior.folder", str(carried.folder(folder)))
    elif folder:
        carried.leave("class_data_dir", folder, "no images are there: the base draws them into the cache")
    return True


def _words(instance: Any, of_class: Any, *, preserved: bool, validation: Any, carried: Carried) -> None:
    """Token and noun from both prompts: the token is the word that only the first one has."""
    token, noun = token_and_noun(str(instance or ""), str(of_class or ""))

    def filled(text: str) -> str:
        for word, name in ((token, "{token}"), (noun, "{noun}")):
            text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", name, text) if word else text
        return text

    if token:
        carried.put("instance_prompt", instance, "data.token", token)
        carried.put("instance_prompt", instance, "data.token_pieces", 32, "other trainers allow a token of any pieces")
    if noun:
        carried.put("class_prompt", of_class or instance, "data.class_noun", noun)
    if "data" in carried.values:
        carried.put(
            "instance_prompt", instance, "data.templates", [filled(str(instance))] if instance else ["{token}"]
        )
    if preserved:
        carried.put("class_prompt", of_class, "prior.prompt", filled(str(of_class or "")) or "{noun}")
    elif of_class:
        carried.leave("class_prompt", of_class, "it only counts with --with_prior_preservation")
    if validation:
        carried.put("validation_prompt", validation, "sample.prompts", [filled(str(validation))])


def token_and_noun(instance: str, of_class: str) -> tuple[str, str]:
    """("sks", "dog") of "a photo of sks dog" and "a photo of dog"; without the second prompt the token is the first
    word that is in no list of English words, and the noun what follows."""
    words = re.findall(r"[\w<>{}-]+", instance)
    others = {word.lower() for word in re.findall(r"[\w<>{}-]+", of_class)}
    known = others or _english()
    unknown = [number_of for number_of, word in enumerate(words) if word.lower() not in known | set(ARTICLES)]
    if not unknown:
        return "", ""
    place = unknown[0]
    rest = words[place + 1 :]
    noun = [word for word in rest if not others or word.lower() in others]
    return words[place], " ".join(noun) if noun and " ".join(noun) in instance else ""


def _english() -> set[str]:
    """The words of the package's own lists, and those of prompts."""
    from pathlib import Path

    folder = Path(captions.__file__).parent
    words = {word for name in ("words.txt", "known.txt") for word in read_utf8(folder / name).lower().split()}
    return words | set(
        "photo picture image painting drawing illustration portrait of in the style with and on".split()
    )


def _epochs(epochs: int, named: Any, carried: Carried) -> None:
    seen = images_in(carried.folder(named)) if named else 0
    if seen:
        steps = epochs_to_steps(epochs, seen, carried.at("run.batch_size", BATCH))
        carried.put("num_train_epochs", epochs, "run.steps", steps, f"{seen} photos an epoch")
    else:
        carried.leave(
            "num_train_epochs", epochs, "the photos are not there, so nothing says how many steps an epoch has"
        )
