"""OneTrainer's JSON: a preset or a saved config, with its concepts.

Names and defaults: Nerogar/OneTrainer, modules/util/config/TrainConfig.py and ConceptConfig.py, values in
modules/util/enum/; training_presets/*.json hold what differs from the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.trainers.carried import (
    LEFT,
    Carried,
    Line,
    Rule,
    as_text,
    choice,
    epochs_to_steps,
    flat,
    images_in,
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
from finetune.core.reading import parse_json, read_utf8

EPOCHS, RANK, ALPHA, WARMUP, LR = 100, 16, 1.0, 200, 3e-6  # defaults that a preset leaves out
METHODS = {"LORA": "lora", "FINE_TUNE": "full", "EMBEDDING": "textual_inversion"}
PEFT = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr", "OFT_2": "oft"}
WEIGHTS = {
    "CONSTANT": {"kind": "none"}, "P2": {"kind": "p2"}, "DEBIASED_ESTIMATION": {"kind": "debiased"},
    "MIN_SNR_GAMMA": {"kind": "min_snr"},
}  # fmt: skip


def name_of(destination: Any) -> str:
    """The recipe's `run.name`, of models/lora.safetensors."""
    return run_name(str(destination).replace("\\", "/").split("/")[-1].removesuffix(".safetensors"))


RULES = {
    "base_model_name": Rule("base.source", as_text), "output_model_destination": Rule("run.name", name_of),
    "training_method": Rule("method.kind", one_of(METHODS)), "lora_rank": Rule("method.rank", whole),
    "lora_alpha": Rule("method.alpha", positive), "dropout_probability": Rule("method.dropout", number),
    "batch_size": Rule("run.batch_size", whole), "resolution": Rule("data.resolution", resolution),
    "train_dtype": Rule("run.precision", precision), "learning_rate": Rule("optim.lr", positive),
    "text_encoder.learning_rate": Rule("optim.text_lr", positive),
    "text_encoder_learning_rate": Rule("optim.text_lr", positive),
    "learning_rate_scheduler": Rule("optim.schedule", schedule),
    "learning_rate_warmup_steps": Rule("optim.warmup", whole), "clip_grad_norm": Rule("optim.max_grad_norm", number),
    "optimizer": Rule("optim.kind", optimiser), "optimizer.optimizer": Rule("optim.kind", optimiser),
    "optimizer.weight_decay": Rule("optim.weight_decay", number), "optimizer.eps": Rule("optim.eps", positive),
    "weight_decay": Rule("optim.weight_decay", number), "optimizer.d_coef": Rule("optim.d_coef", positive),
    "aspect_ratio_bucketing": Rule("data.shape", choice("buckets", "square")),
    "offset_noise_weight": Rule("objective.noise_offset", number),
    "perturbation_noise_weight": Rule("objective.input_perturbation", number),
    "loss_weight_fn": Rule("objective.weighting", one_of(WEIGHTS)),
    "masked_training": Rule("data.masks", choice("auto", "none")),
    "unmasked_weight": Rule("data.mask_floor", number),
}  # fmt: skip
FILES = "exports, checkpoints and caches of a run have places of their own"
REASONS = {
    "model_type": "the base's own config says it", "weight_dtype": "run.precision chooses it for all parts",
    "workspace_dir": FILES, "cache_dir": FILES, "output_model_format": FILES, "output_dtype": FILES,
    "tensorboard": "run.trackers=[tensorboard] writes it", "samples": "write sample.prompts",
    "sample_definition_file_name": "write sample.prompts", "latent_caching": "latents are always cached",
    "unmasked_probability": "a mask always counts", "attention_mechanism": "only how it is computed",
    "rescale_noise_scheduler_to_zero_terminal_snr": "the base's own schedule is kept",
    "gradient_checkpointing": "newer files say it for each part; run.gradient_checkpointing is for all",
}  # fmt: skip
OF_CONCEPT = {
    "image.enable_random_flip": Rule("data.flip", truth),
    "image.enable_crop_jitter": Rule("data.crop", choice("random", "center")),
    "text.enable_tag_shuffling": Rule("data.shuffle_tags", truth),
    "text.keep_tags_count": Rule("data.keep_tags", whole),
}  # fmt: skip
CONCEPT_REASONS = {
    "name": "a name for people", "seed": "draws follow run.seed", "image_variations": "crops are drawn each step",
    "text_variations": "captions are drawn each step", "balancing_strategy": "repeats are relative to other concepts",
    "include_subdirectories": "photos of sub-folders are not read: move them into one folder",
    "text.tag_delimiter": "tags end at commas", "text.prompt_source": "captions are read from NAME.txt beside photos",
}  # fmt: skip


def of_one_trainer(settings: dict[str, Any], carried: Carried) -> None:
    """Carries a config or a preset over. What it leaves out has OneTrainer's default, where ours is another."""
    defaults = {
        "learning_rate": LR, "learning_rate_warmup_steps": WARMUP, "aspect_ratio_bucketing": True, "lora_alpha": ALPHA,
        "lora_rank": RANK,
    }  # fmt: skip
    given = dict(settings)
    for key, value in defaults.items():
        given.setdefault(key, value)
    if given.get("training_method") != "LORA":
        for key in ("lora_rank", "lora_alpha"):
            carried.leave(key, given.pop(key), "only a LoRA has it")
    concepts = _concepts(given, carried)
    epochs, parts = whole(given.pop("epochs", EPOCHS)), whole(given.pop("gradient_accumulation_steps", 1))
    _ema(given, carried)
    _several(given, carried)
    carried.carry(dict(flat(given)), RULES, REASONS)
    batch = carried.at("run.batch_size", 1) * parts
    if parts > 1:
        carried.put("gradient_accumulation_steps", parts, "run.accumulate", parts)
        carried.put("batch_size", batch // parts, "run.batch_size", batch, "all photos of a step")
    _put_concepts(concepts, carried)
    _length(epochs, concepts, batch, carried)
    if not carried.at("data.shuffle_tags") and carried.at("data.keep_tags") is not None:
        carried.drop("data.keep_tags", "it only counts with text.enable_tag_shuffling")
    if carried.at("data.masks") in (None, "none") and carried.at("data.mask_floor") is not None:
        carried.drop("data.mask_floor", "it only counts with masked_training")


def _several(given: dict[str, Any], carried: Carried) -> None:
    """What several settings say together."""
    encoder = given.get("text_encoder")
    trains = encoder.get("train", True) if isinstance(encoder, Mapping) else given.get("train_text_encoder", True)
    if given.get("training_method") == "LORA":
        carried.put("text_encoder.train", trains, "method.parts", ["denoiser", *(["text_encoders"] if trains else [])])
    if isinstance(encoder, Mapping):
        given["text_encoder"] = {key: value for key, value in encoder.items() if key != "train"}
    kind = given.pop("peft_type", None)
    if kind in PEFT and kind != "LORA":
        given.pop("training_method", None)
        carried.put("peft_type", kind, "method.kind", PEFT[kind])
    elif kind not in (None, "LORA"):
        carried.leave("peft_type", kind, f"there are {', '.join(PEFT)}")
    if given.pop("lora_decompose", False):
        given.pop("training_method", None)
        carried.put("lora_decompose", True, "method.kind", "dora")
    if given.get("loss_weight_fn") == "MIN_SNR_GAMMA":
        gamma = number(given.pop("loss_weight_strength", 5.0))
        given.pop("loss_weight_fn")
        carried.put("loss_weight_strength", gamma, "objective.weighting", {"kind": "min_snr", "gamma": gamma})


def _ema(given: dict[str, Any], carried: Carried) -> None:
    kind, decay = given.pop("ema", "OFF"), given.pop("ema_decay", 0.999)
    if kind != "OFF":
        carried.put("ema_decay", decay, "run.ema", number(decay))
    else:
        carried.leave("ema_decay", decay, "ema is OFF")


def _concepts(given: dict[str, Any], carried: Carried) -> list[dict[str, Any]]:
    """The enabled concepts: in the file, or in the file that it names."""
    named = given.pop("concept_file_name", None)
    found = given.pop("concepts", None)
    if not found and named:
        files = [folder / str(named) for folder in (carried.home, carried.home.parent)]
        file = next((each for each in files if each.is_file()), None)
        if file is None:
            carried.leave(
                "concept_file_name", named, "it is not there: give a config with its concepts, or put it there"
            )
            return []
        found = parse_json(read_utf8(file), str(file), list)
    kept = []
    for concept in found or []:
        if concept.get("enabled", True) and not concept.get("validation_concept"):
            kept.append(concept)
        else:
            carried.leave(
                "concept", concept.get("path"), "not enabled, or for validation: data.hold_out holds photos out"
            )
    return kept


def _put_concepts(concepts: list[dict[str, Any]], carried: Carried) -> None:
    for index, concept in enumerate(concepts):
        folder = carried.folder(concept.get("path", ""))
        repeats = number(concept.get("balancing", concept.get("repeats", 1)))
        weight = number(concept.get("loss_weight", 1))
        used = {key: value for key, value in concept.items() if key not in OF_PLACE}
        if index == 0:
            why = "" if folder.is_dir() else "it is not there: correct it"
            carried.put("concepts[0].path", concept.get("path"), "data.photos", str(folder), why)
            carried.carry(dict(flat(used)), OF_CONCEPT, CONCEPT_REASONS)
        else:
            subjects = carried.values["data"].setdefault("subjects", [])
            subjects.append({"photos": str(folder)})
            carried.note(
                f"concepts[{index}].path", concept.get("path"), f"data.subjects[{index - 1}].photos", str(folder)
            )
            carried.carry({f"concepts[{index}].{key}": value for key, value in flat(used)}, {}, CONCEPT_REASONS)
        _emphasis(index, repeats, weight, carried)
    if concepts:
        carried.values["data"]["templates"] = ["{token}"]
        _refuse_equal_repeats(carried)


OF_PLACE = ("path", "balancing", "repeats", "loss_weight", "enabled", "validation_concept")


def _emphasis(index: int, repeats: float, weight: float, carried: Carried) -> None:
    """Repeats count where another concept has others; a share of an epoch (0.5) has no counterpart."""
    place = carried.values["data"] if index == 0 else carried.at("data.subjects")[index - 1]
    where = "data" if index == 0 else f"data.subjects[{index - 1}]"
    if repeats != int(repeats) or repeats < 1:
        carried.leave(f"concepts[{index}].balancing", repeats, "repeats are whole numbers here")
    elif repeats > 1:
        place["repeats"] = int(repeats)
        carried.note(f"concepts[{index}].balancing", repeats, f"{where}.repeats", int(repeats))
    if weight != 1:
        place["weights"] = {"*": weight}
        carried.note(f"concepts[{index}].loss_weight", weight, f"{where}.weights", {"*": weight})


def _refuse_equal_repeats(carried: Carried) -> None:
    """Repeats are relative: equal ones only make epochs longer."""
    places = [carried.values["data"], *carried.at("data.subjects", [])]
    if len({place.get("repeats", 1) for place in places}) > 1:
        return
    for place in places:
        place.pop("repeats", None)
    why = "equal repeats only make epochs longer: run.steps says how long a run is"
    carried.lines = [
        Line(line.key, line.value, LEFT, "", why) if line.key.endswith("].balancing") else line
        for line in carried.lines
    ]


def _length(epochs: int, concepts: list[dict[str, Any]], batch: int, carried: Carried) -> None:
    seen = 0.0
    for concept in concepts:
        many = number(concept.get("balancing", concept.get("repeats", 1)))
        seen += images_in(carried.folder(concept.get("path", ""))) * many
    if seen:
        steps = epochs_to_steps(epochs, max(1, round(seen)), batch)
        carried.put("epochs", epochs, "run.steps", steps, f"{seen:g} photos an epoch with their repeats")
    else:
        carried.leave("epochs", epochs, "the photos are not there, so nothing says how many steps an epoch has")
