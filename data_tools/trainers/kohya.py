"""kohya's sd-scripts: `10_sks dog` folders, the dataset TOML, and flags or a TOML of them (--config_file).

Names and defaults: kohya-ss/sd-scripts, docs/config_README-en.md (dataset TOML), docs/train_network.md and
docs/train_README-en.md (folders), library/train_util.py `add_*_arguments` (flags).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.trainers.carried import (
    Carried,
    NoCounterpart,
    Rule,
    as_text,
    choice,
    epochs_to_steps,
    images_in,
    min_snr,
    number,
    one_of,
    optimiser,
    pairs_of,
    positive,
    precision,
    put_subject,
    resolution,
    run_name,
    schedule,
    split_words,
    truth,
    whole,
)
from finetune.core.errors import BadInput
from finetune.core.reading import read_utf8
from finetune.data.sources.kohya_folder import NAME

STEPS, BATCH = 1600, 1  # the defaults of max_train_steps and train_batch_size
ALPHA = 1.0  # of network_alpha
# network_args may say another algorithm of lycoris
NETWORKS = {"networks.lora": "lora", "networks.oft": "oft", "lycoris.kohya": "lora"}
ALGORITHMS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "oft": "oft", "diag-oft": "oft"}


def warmup(value: Any) -> int:
    """Steps; newer versions also take a share of the run, which a recipe has not."""
    if 0 < float(value) < 1:
        raise NoCounterpart("a share of the run: write its steps into optim.warmup")
    return whole(value)


RULES = {
    "pretrained_model_name_or_path": Rule("base.source", as_text),
    "output_name": Rule("run.name", run_name), "seed": Rule("run.seed", whole),
    "train_batch_size": Rule("run.batch_size", whole), "batch_size": Rule("run.batch_size", whole),
    "mixed_precision": Rule("run.precision", precision),
    "gradient_checkpointing": Rule("run.gradient_checkpointing", truth),
    "max_train_steps": Rule("run.steps", whole), "save_every_n_steps": Rule("run.checkpoint_every", whole),
    "learning_rate": Rule("optim.lr", positive), "unet_lr": Rule("optim.lr", positive),
    "text_encoder_lr": Rule("optim.text_lr", positive), "optimizer_type": Rule("optim.kind", optimiser),
    "lr_scheduler": Rule("optim.schedule", schedule), "lr_warmup_steps": Rule("optim.warmup", warmup),
    "max_grad_norm": Rule("optim.max_grad_norm", number),
    "network_module": Rule("method.kind", one_of(NETWORKS)), "network_dim": Rule("method.rank", whole),
    "network_alpha": Rule("method.alpha", positive), "network_dropout": Rule("method.dropout", number),
    "noise_offset": Rule("objective.noise_offset", number),
    "ip_noise_gamma": Rule("objective.input_perturbation", number),
    "min_snr_gamma": Rule("objective.weighting", min_snr),
    "prior_loss_weight": Rule("prior.weight", number),
    "resolution": Rule("data.resolution", resolution), "flip_aug": Rule("data.flip", truth),
    "enable_bucket": Rule("data.shape", choice("buckets", "square")),
    "random_crop": Rule("data.crop", choice("random", "center")),
    "shuffle_caption": Rule("data.shuffle_tags", truth), "keep_tokens": Rule("data.keep_tags", whole),
    "caption_dropout_rate": Rule("data.caption_dropout", number),
    "sample_every_n_steps": Rule("sample.every", whole),
}  # fmt: skip
SPECIAL = ("max_train_epochs", "save_every_n_epochs", "sample_prompts")  # they depend on the photos, or on a file

OWN_CONFIG = "a base's own config says it"
FILES = "exports and checkpoints of a run have places of their own: RUN/exports, RUN/checkpoints"
MEMORY = "it changes only how fast a run is, or its memory, which is chosen by itself here"
REASONS = {
    "v2": OWN_CONFIG, "v_parameterization": OWN_CONFIG, "sdxl": OWN_CONFIG, "clip_skip": OWN_CONFIG,
    "max_token_length": "captions are as long as the base reads them (data.long_captions)",
    "output_dir": FILES, "save_model_as": FILES, "save_precision": FILES, "logging_dir": FILES, "log_prefix": FILES,
    "save_last_n_steps": FILES, "save_state": "checkpoints always hold the state",
    "xformers": MEMORY, "sdpa": MEMORY, "mem_eff_attn": MEMORY, "lowram": MEMORY, "highvram": MEMORY,
    "cache_latents": "latents are always cached", "cache_latents_to_disk": "latents are always cached on the disk",
    "cache_text_encoder_outputs": "prompts are always cached where text encoders do not train",
    "max_data_loader_n_workers": MEMORY, "persistent_data_loader_workers": MEMORY, "cache_info": MEMORY,
    "caption_prefix": "write it into the captions: finetune data caption --template 'PREFIX{caption}'",
    "caption_suffix": "write it into the captions: finetune data caption --template '{caption}SUFFIX'",
    "caption_extension": "captions are read from NAME.txt and NAME.caption: rename other ones",
    "caption_tag_dropout_rate": "tags are shuffled, not dropped at random",
    "bucket_no_upscale": "photos are enlarged to fill their bucket; the plan names them",
    "min_bucket_reso": "buckets follow data.resolution and data.bucket_tolerance",
    "max_bucket_reso": "buckets follow data.resolution and data.bucket_tolerance",
    "bucket_reso_steps": "the base says it",
}  # fmt: skip


def of_folders(photos: Path, reg: Path | None, carried: Carried) -> None:
    """Carries kohya's folders over: `photos` holds "10_sks dog", `reg` holds "1_dog".

    Raises:
        BadInput: there is no such folder with images.
    """
    subsets = _named_subsets(photos)
    if not subsets:
        raise BadInput(f"{photos} has no folder such as '10_sks dog' with images: give the folder around it")
    _put_subsets([*subsets, *(_reg_subsets(reg) if reg is not None else [])], carried)


def _named_subsets(around: Path) -> list[dict[str, Any]]:
    """The folders "10_sks dog" in a folder, as a dataset TOML would name them."""
    found = [folder for folder in sorted(around.iterdir()) if NAME.fullmatch(folder.name) and images_in(folder)]
    named = [(folder, NAME.fullmatch(folder.name)) for folder in found]
    return [
        {"image_dir": str(folder.absolute()), "class_tokens": name[2], "num_repeats": int(name[1])}
        for folder, name in named
        if name is not None
    ]


def _reg_subsets(reg: Path) -> list[dict[str, Any]]:
    found = _named_subsets(reg) if reg.is_dir() else []
    if not found:
        raise BadInput(f"{reg} has no folder such as '1_dog' with images: give the folder around it, or leave it out")
    return [{**subset, "is_reg": True} for subset in found]


def of_flags(settings: dict[str, Any], carried: Carried) -> None:
    """Carries flags over, or a TOML of them, with the dataset TOML and the folders that they name."""
    settings = dict(settings)
    special = {key: settings.pop(key) for key in SPECIAL if key in settings}
    subsets, general = _data_of(settings, carried)
    _method(settings, carried)
    carried.carry({**general, **settings}, RULES, REASONS)
    _put_subsets(subsets, carried)
    _length(special, subsets, carried)
    _sample_prompts(special.pop("sample_prompts", None), carried)
    for key, value in special.items():
        if not any(line.key == key for line in carried.lines):
            carried.leave(key, value, "the photos are not there, so nothing says how many steps an epoch has")
    if not carried.at("data.shuffle_tags") and carried.at("data.keep_tags") is not None:
        carried.drop("data.keep_tags", "it only counts with shuffle_caption")


def of_dataset(settings: dict[str, Any], carried: Carried) -> None:
    """Carries a dataset TOML over (--dataset_config)."""
    subsets, general = _subsets(settings, carried)
    carried.carry(general, RULES, REASONS)
    _put_subsets(subsets, carried)
    if not carried.at("data.shuffle_tags") and carried.at("data.keep_tags") is not None:
        carried.drop("data.keep_tags", "it only counts with shuffle_caption")


def _data_of(settings: dict[str, Any], carried: Carried) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The subsets and the settings of the data that flags name. They are taken out of `settings`."""
    named = settings.pop("dataset_config", None)
    if named:
        from data_tools.trainers.reading import read_settings

        file = carried.folder(named)
        if not file.is_file():
            raise BadInput(f"--dataset_config is {named}, which is not there: give the file beside these settings")
        return _subsets(read_settings(file).values, carried)
    train, reg = settings.pop("train_data_dir", None), settings.pop("reg_data_dir", None)
    if not train:
        return [], {}
    photos = carried.folder(train)
    if not photos.is_dir():
        carried.put("train_data_dir", train, "data.photos", str(photos), "it is not there: correct it")
        return [], {}
    subsets = _named_subsets(photos)
    if not subsets:
        subsets = [{"image_dir": str(photos), "num_repeats": 1}]
    reg_folder = carried.folder(reg) if reg else None
    if reg_folder is not None and reg_folder.is_dir():
        subsets += _reg_subsets(reg_folder)
    elif reg:
        carried.leave("reg_data_dir", reg, "it is not there")
    return subsets, {}


OF_SUBSET = ("image_dir", "class_tokens", "num_repeats", "is_reg", "metadata_file")


def _subsets(settings: Mapping[str, Any], carried: Carried) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The subsets with what they inherit, and the settings of the first one's photos, which a recipe has for all.

    What another subset has instead is named.
    """
    general, sets = dict(settings.get("general", {})), settings.get("datasets", [])
    for key in settings.keys() - {"general", "datasets"}:
        carried.leave(key, settings[key], "a dataset TOML has general and datasets")
    found: list[tuple[str, dict[str, Any]]] = []
    for number_of, each in enumerate(sets):
        own = {key: value for key, value in each.items() if key != "subsets"}
        for index, subset in enumerate(each.get("subsets", [])):
            found.append((f"datasets[{number_of}].subsets[{index}]", {**general, **own, **subset}))
    main = next((values for _, values in found if not values.get("is_reg")), {})
    shared = {key: value for key, value in main.items() if key not in OF_SUBSET}
    for where, values in [("general", general), *found]:
        for key, value in values.items():
            if key not in OF_SUBSET and shared.get(key) != value:
                carried.leave(f"{where}.{key}", value, f"a recipe has one value for all photos: {shared.get(key)}")
    subsets = [{key: values[key] for key in OF_SUBSET if key in values} for _, values in found]
    return subsets, shared


def _put_subsets(subsets: list[dict[str, Any]], carried: Carried) -> None:
    photos = [subset for subset in subsets if not subset.get("is_reg")]
    tokens: set[str] = set()
    used = []
    for subset in photos:
        folder, words = carried.folder(subset.get("image_dir", "")), str(subset.get("class_tokens") or "")
        token = split_words(words)[0].lower()
        if tokens and (not token or token in tokens):
            why = "a second folder of the same token: move its photos to the first one"
            carried.leave("image_dir", str(folder), why)
            continue
        used.append(subset)
        if tokens:
            _further(subset, folder, words, carried)
        else:
            _first(subset, folder, words, carried)
        tokens.add(token)
        if subset.get("metadata_file"):
            why = "captions are read from files beside the photos or metadata.jsonl"
            carried.leave("metadata_file", subset["metadata_file"], why)
    _repeats(used, carried)
    reg = [subset for subset in subsets if subset.get("is_reg")]
    if reg:
        _class_images(reg, carried)


def _first(subset: Mapping[str, Any], folder: Path, words: str, carried: Carried) -> None:
    why = "" if folder.is_dir() else "it is not there: correct it"
    carried.put("image_dir", subset["image_dir"], "data.photos", str(folder), why)
    if words:
        put_subject(carried, "class_tokens", words)
        return
    carried.values["data"]["templates"] = ["{token}"]


def _further(subset: Mapping[str, Any], folder: Path, words: str, carried: Carried) -> None:
    token, noun = split_words(words)
    further = {"photos": str(folder), "token": token, **({"class_noun": noun} if noun else {})}
    known = carried.values["data"].setdefault("subjects", [])
    known.append(further)
    carried.note("image_dir", subset["image_dir"], f"data.subjects[{len(known) - 1}]", further)


def _repeats(photos: list[dict[str, Any]], carried: Carried) -> None:
    """Repeats are relative: of one subject they only make epochs longer."""
    given = [whole(subset.get("num_repeats") or 1) for subset in photos]
    subjects = carried.at("data.subjects", [])
    if len(set(given)) <= 1:
        for many in sorted(set(given)):
            carried.leave(
                "num_repeats", many, "equal repeats only make epochs longer: run.steps says how long a run is"
            )
        return
    carried.put("num_repeats", given[0], "data.repeats", given[0])
    for index, (subject, many) in enumerate(zip(subjects, given[1:], strict=True)):
        subject["repeats"] = many
        carried.note("num_repeats", many, f"data.subjects[{index}].repeats", many)


def _class_images(reg: list[dict[str, Any]], carried: Carried) -> None:
    first = reg[0]
    folder, words = carried.folder(first.get("image_dir", "")), str(first.get("class_tokens") or "")
    weight = carried.at("prior.weight", 1.0)
    noun = carried.at("data.class_noun")
    carried.values["prior"] = {"kind": "class_images", "weight": weight, "caption_dropout": 0.0, "flip": False}
    carried.put("is_reg", True, "prior.kind", "class_images")
    if images_in(folder):
        carried.put("image_dir", str(folder), "prior.folder", str(folder))
        carried.put("image_dir", str(folder), "prior.count", images_in(folder))
    else:
        carried.leave("image_dir", str(folder), "no images are there: the base draws class images")
    carried.put("class_tokens", words, "prior.prompt", "{noun}" if noun == words else words or "{noun}")
    for other in reg[1:]:
        carried.leave("image_dir", other.get("image_dir"), "a recipe has one folder of class images")


def _method(settings: dict[str, Any], carried: Carried) -> None:
    """What several flags say together: parts, algorithm, alpha, optimiser arguments."""
    arguments = pairs_of(settings.pop("network_args", None) or [])
    only_unet = settings.pop("network_train_unet_only", False)
    only_text = settings.pop("network_train_text_encoder_only", False)
    cached = settings.get("cache_text_encoder_outputs")
    if "network_module" in settings:
        both = ["text_encoders"] if only_text else ["denoiser", "text_encoders"]
        parts = ["denoiser"] if only_unet or cached else both
        carried.put("network_train_unet_only", bool(only_unet), "method.parts", parts)
        settings.setdefault("network_alpha", ALPHA)
    if settings.pop("use_8bit_adam", False):
        settings["optimizer_type"] = "AdamW8bit"
    if "unet_lr" in settings and "learning_rate" in settings:
        carried.leave("learning_rate", settings.pop("learning_rate"), "unet_lr wins")
    _batch(settings, carried)
    _optimiser_arguments(pairs_of(settings.pop("optimizer_args", None) or []), carried)
    algorithm = arguments.pop("algo", None)
    if algorithm is not None and algorithm in ALGORITHMS:
        settings.pop("network_module", None)
        carried.put("network_args.algo", algorithm, "method.kind", ALGORITHMS[algorithm])
    elif algorithm is not None:
        carried.leave("network_args.algo", algorithm, f"there are {', '.join(ALGORITHMS)}")
    if arguments.get("conv_dim") and str(arguments["conv_dim"]) == str(settings.get("network_dim")):
        carried.put("network_args.conv_dim", arguments.pop("conv_dim"), "method.targets", "conv")
    for key, value in arguments.items():
        carried.leave(f"network_args.{key}", value, "a recipe has one rank and alpha for all layers")


def _batch(settings: dict[str, Any], carried: Carried) -> None:
    """Here a step's photos are all that are seen before the weights change."""
    parts = whole(settings.pop("gradient_accumulation_steps", 1) or 1)
    size = whole(settings.get("train_batch_size") or BATCH)
    if parts > 1:
        settings.pop("train_batch_size", None)
        carried.put("gradient_accumulation_steps", parts, "run.accumulate", parts)
        carried.put("train_batch_size", size, "run.batch_size", size * parts, "all photos of a step")


def _optimiser_arguments(arguments: Mapping[str, str], carried: Carried) -> None:
    rules = {
        "weight_decay": Rule("optim.weight_decay", number), "eps": Rule("optim.eps", positive),
        "betas": Rule("optim.betas", lambda value: [float(part) for part in re.sub(r"[()\s]", "", value).split(",")]),
        "d_coef": Rule("optim.d_coef", positive), "d0": Rule("optim.d0", positive),
        "use_bias_correction": Rule("optim.bias_correction", truth),
    }  # fmt: skip
    carried.carry(dict(arguments), rules, {})


def _length(settings: Mapping[str, Any], subsets: list[dict[str, Any]], carried: Carried) -> None:
    """The steps of a run that counts epochs, and with class images half of those that are given."""
    photos = [subset for subset in subsets if not subset.get("is_reg")]
    seen = sum(images_in(carried.folder(s["image_dir"])) * whole(s.get("num_repeats") or 1) for s in photos)
    batch, classes = carried.at("run.batch_size", BATCH), len(photos) < len(subsets)
    epochs = settings.get("max_train_epochs")
    if epochs and seen:
        steps = epochs_to_steps(whole(epochs), seen, batch)
        carried.put("max_train_epochs", epochs, "run.steps", steps, f"{seen} photos an epoch with their repeats")
    elif classes:
        steps = carried.at("run.steps", STEPS)
        why = "half of kohya's samples are class images; a step here has as many of them beside its photos"
        carried.put("max_train_steps", steps, "run.steps", max(1, steps // 2), why)
    elif carried.at("run.steps") is None:
        carried.put("max_train_steps", None, "run.steps", STEPS, "kohya's default")
    every = settings.get("save_every_n_epochs")
    if every and seen:
        carried.put("save_every_n_epochs", every, "run.checkpoint_every", epochs_to_steps(whole(every), seen, batch))


def _sample_prompts(named: Any, carried: Carried) -> None:
    """The prompts of a file with one in each line: "a cat --n bad --w 512"."""
    file = carried.folder(named) if named else None
    if file is None or not file.is_file() or file.suffix not in (".txt", ""):
        if named:
            carried.leave("sample_prompts", named, "no text file is there: write sample.prompts")
        return
    lines = [line.split(" --")[0].strip() for line in read_utf8(file).splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if prompts:
        carried.put("sample_prompts", named, "sample.prompts", prompts, "their options after -- are left out")
