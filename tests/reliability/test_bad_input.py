"""Bad input of every kind, as a person meets it: exit code 2, one sentence, and nothing left behind.

Each case makes its own input and gives the command; `words` must stand in the sentence: what, which value, what to do.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import bad_places  # noqa: F401 - its cases
import bad_settings  # noqa: F401 - its cases
import numpy as np
import pytest
import torch
from bad_table import CASES, Place, case, setting
from conftest import write_photos
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune.cli.main import run

# photos


@case("there is no folder", "/nowhere", "give the folder")
def photos_folder_missing(place: Place) -> list[str]:
    return place.train("data.photos=/nowhere")


@case("0.png is a file", "give the folder that holds the photos")
def photos_folder_is_a_file(place: Place) -> list[str]:
    return place.train(f"data.photos={place.photos / '0.png'}")


@case("holds no images", ".jpg")
def photos_none(place: Place) -> list[str]:
    (place.path / "empty").mkdir()
    return place.train(f"data.photos={place.path / 'empty'}")


@case("zero.png (empty file)")
def photo_of_zero_bytes(place: Place) -> list[str]:
    (place.photos / "zero.png").touch()
    return place.train()


@case("cut.jpg (truncated)")
def photo_truncated(place: Place) -> list[str]:
    Image.effect_noise((64, 64), 90).save(place.photos / "cut.jpg")
    content = (place.photos / "cut.jpg").read_bytes()
    (place.photos / "cut.jpg").write_bytes(content[: len(content) // 2])
    return place.train()


@case("notes.jpg (not an image")
def photo_is_text(place: Place) -> list[str]:
    (place.photos / "notes.jpg").write_text("these are my notes")
    return place.train()


@case("bomb.png (more than", "make it smaller")
def photo_is_a_bomb(place: Place) -> list[str]:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (place.photos / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    return place.train()


@case("phone.heic (", "fix or remove")
def photo_is_heic(place: Place) -> list[str]:
    (place.photos / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    return place.train()


@case("strip.png", "2000x20", "crop it")
def photo_is_a_strip(place: Place) -> list[str]:
    Image.new("RGB", (2000, 20)).save(place.photos / "strip.png")
    return place.train()


@case("small.png", "10x10", "too small")
def photo_too_small(place: Place) -> list[str]:
    Image.new("RGB", (10, 10)).save(place.photos / "small.png")
    return place.train()


@case("loop.png", "symbolic links")
def photo_is_a_symlink_loop(place: Place) -> list[str]:
    (place.photos / "loop.png").symlink_to(place.photos / "loop.png")
    return place.train()


@case("gone.png", "No such file")
def photo_is_a_dangling_link(place: Place) -> list[str]:
    (place.photos / "gone.png").symlink_to(place.path / "nothing.png")
    return place.train()


@case("locked.png", "Input/output error")
def photo_unreadable(place: Place) -> list[str]:
    """A file that nobody can read, root included."""
    (place.photos / "locked.png").symlink_to("/proc/self/mem")
    return place.train()


@case("damaged.png", "damaged")
def photo_with_flipped_bits(place: Place) -> list[str]:
    content = bytearray((place.photos / "0.png").read_bytes())
    for index in range(60, len(content) - 12, 7):
        content[index] ^= 0x55
    (place.photos / "damaged.png").write_bytes(content)
    return place.train()


@case("UTF-8", "rename it")
def photo_name_not_utf8(place: Place) -> list[str]:
    Image.new("RGB", (48, 48)).save(os.fsencode(place.photos) + b"/caf\xe9.png")
    return place.train()


@case("all 40 photos", "same image", "different photos")
def photos_one_forty_times(place: Place) -> list[str]:
    folder = place.path / "same"
    folder.mkdir()
    for number in range(40):
        shutil.copy(place.photos / "0.png", folder / f"{number}.png")
    return place.train(f"data.photos={folder}")


@case("3 of 6 files", "a.png (empty file)", "b.jpg (not an image", "c.gif")
def photos_bad_ones_are_listed_together(place: Place) -> list[str]:
    (place.photos / "a.png").touch()
    (place.photos / "b.jpg").write_text("b")
    (place.photos / "c.gif").write_bytes(b"GIF89a\0\0")
    place.base = Path("/no/base/is/looked/at")
    return place.train()


@case("holds no images that can be used", "a.png")
def photos_all_bad_with_skip_bad(place: Place) -> list[str]:
    folder = place.path / "bad"
    folder.mkdir()
    (folder / "a.png").touch()
    return [*place.train(f"data.photos={folder}"), "--skip-bad"]


# captions


@case("0.txt", "not UTF-8", "save it as UTF-8")
def caption_not_utf8(place: Place) -> list[str]:
    (place.photos / "0.txt").write_bytes(b"a caf\xe9")
    return place.train()


@case("no caption was found for 1.png, 2.png", "data.captions=auto")
def captions_demanded_but_missing(place: Place) -> list[str]:
    return place.captioned("0.txt", "a photo of {token} mug", "data.captions=files")


@case("no caption was found for 0.png")
def caption_empty_where_demanded(place: Place) -> list[str]:
    for number in range(3):
        (place.photos / f"{number}.txt").write_text("a mug" if number else "  \n")
    return place.train("data.captions=files")


@case("captions.csv", "nine.png", "is not there")
def caption_for_a_missing_photo(place: Place) -> list[str]:
    return place.captioned("captions.csv", "0.png,a mug\nnine.png,a mug\n")


@case("captions.csv", "two columns", "quotes")
def captions_of_three_columns(place: Place) -> list[str]:
    return place.captioned("captions.csv", "0.png,a mug, red\n")


@case("0.caption and 0.txt", "keep one")
def captions_two_that_differ(place: Place) -> list[str]:
    (place.photos / "0.txt").write_text("a {token} mug")
    (place.photos / "0.caption").write_text("a {token} cup")
    return place.train()


@case("metadata.csv", "names its columns", "add that line")
def captions_metadata_without_header(place: Place) -> list[str]:
    return place.captioned("metadata.csv", "0.png,a mug\n")


@case("'10_sks dog', '5_sks dog'", "data.subjects")
def photos_in_several_of_kohyas_folders(place: Place) -> list[str]:
    for name in ("10_sks dog", "5_sks dog"):
        shutil.copytree(place.photos, place.path / "img" / name)
    return place.train(f"data.photos={place.path / 'img'}")


@case("metadata.jsonl line 2", "correct it")
def captions_jsonl_broken(place: Place) -> list[str]:
    return place.captioned("metadata.jsonl", '{"file_name": "0.png", "text": "a"}\n{"file": 3}\n')


@case("16 tokens", "1.png", "data.long_captions=cut")
def caption_longer_than_the_encoder_reads(place: Place) -> list[str]:
    return place.captioned("1.txt", "a small red mug on a big table in the snow at night " * 3)


@case("{noun}", "data.class_noun")
def caption_with_noun_but_none_given(place: Place) -> list[str]:
    return place.captioned(
        "0.txt", "a photo of {token} {noun}", "data.class_noun=null", "data.templates=['a {token}']", "prior.kind=none"
    )


@case("data.templates is empty")
def templates_empty(place: Place) -> list[str]:
    return place.train("data.templates=[]")


# masks


@case("'files'", "no mask for 1.png, 2.png", "NAME.mask.png", "data.masks=auto")
def masks_demanded_but_missing(place: Place) -> list[str]:
    Image.new("L", (48, 40), 255).save(place.photos / "0.mask.png")
    return place.train("data.masks=files")


@case("'alpha'", "0.png, 1.png, 2.png have no alpha channel", "data.masks=auto")
def alpha_demanded_but_missing(place: Place) -> list[str]:
    Image.new("L", (48, 40), 255).save(place.photos / "0.mask.png")
    return place.train("data.masks=alpha")


@case("0.mask.png is black everywhere", "at most 1 of 255", "make the subject white")
def mask_of_labels(place: Place) -> list[str]:
    Image.fromarray(np.eye(40, 48, dtype=np.uint8)).save(place.photos / "0.mask.png")
    return place.train("data.masks=auto")


@case("0.png's alpha channel is black everywhere")
def alpha_of_nothing(place: Place) -> list[str]:
    Image.new("RGBA", (48, 40), (200, 0, 0, 0)).save(place.photos / "0.png")
    return place.train("data.masks=auto")


@case("0.mask.png is 40x48 but its photo is 48x40")
def mask_lies_on_its_side(place: Place) -> list[str]:
    Image.new("L", (40, 48), 255).save(place.photos / "0.mask.png")
    return place.train("data.masks=auto")


@case("0.mask.png", "not an image")
def mask_is_text(place: Place) -> list[str]:
    (place.photos / "0.mask.png").write_text("white")
    return place.train("data.masks=auto")


@case("nine.mask.png", "not there", "rename or remove")
def mask_of_no_photo(place: Place) -> list[str]:
    Image.new("L", (48, 40), 255).save(place.photos / "nine.mask.png")
    return place.train()


@case("masks/nine.png", "not there", "rename or remove")
def mask_in_the_folder_of_no_photo(place: Place) -> list[str]:
    (place.photos / "masks").mkdir()
    Image.new("L", (48, 40), 255).save(place.photos / "masks" / "nine.png")
    return place.train("data.masks=auto")


setting("masks_unknown", "data.masks=yes please", words=("data.masks", "yes please", "alpha"))
setting("mask_floor_absurd", "data.mask_floor=1.5", words=("data.mask_floor", "1.5"))


# recipes


@case("no recipe 'demmo'", "did you mean 'demo'")
def recipe_unknown(place: Place) -> list[str]:
    return ["train", "demmo"]


@case("no recipe")
def recipe_is_a_folder(place: Place) -> list[str]:
    return ["train", str(place.photos)]


@case("'data' is missing")
def recipe_empty(place: Place) -> list[str]:
    return place.recipe("")


@case("'data' is missing")
def recipe_without_data(place: Place) -> list[str]:
    return place.recipe("method: {kind: lora}\noptim: {kind: adamw}\n")


@case("'method' is missing")
def recipe_without_method(place: Place) -> list[str]:
    return place.recipe("data: {photos: x}\noptim: {kind: adamw}\n")


@case("holds a list", "sections")
def recipe_is_a_list(place: Place) -> list[str]:
    return place.recipe("- a\n- b\n")


@case("not valid YAML", "correct that line")
def recipe_broken_yaml(place: Place) -> list[str]:
    return place.recipe("data: {photos: [\n")


@case("not UTF-8", "save it as UTF-8")
def recipe_not_utf8(place: Place) -> list[str]:
    return place.recipe(b"data: {photos: caf\xe9}\n")


@case("not valid YAML", "python/object")
def recipe_with_a_python_tag(place: Place) -> list[str]:
    mark = place.path / "run" / "hacked"
    return place.recipe(f"data: !!python/object/apply:os.system ['touch {mark}']\n")


@case("recipe.yaml", "more values")
def recipe_is_a_bomb(place: Place) -> list[str]:
    return place.recipe(bomb() + "data: {photos: x}\n")


@case("recipe.yaml", "more values")
def recipe_is_a_bomb_in_a_known_key(place: Place) -> list[str]:
    rows = [line.split(": ", 1)[1] for line in bomb().splitlines()]
    return place.recipe(f"data: {{photos: x, templates: [{', '.join(rows)}]}}\nmethod: {{kind: lora}}\n")


def bomb() -> str:
    """Ten to the ninth strings, in 27 aliases."""
    names = "abcdefghz"
    lines = ["a: &a [lol,lol,lol,lol,lol,lol,lol,lol,lol,lol]"]
    for before, name in itertools.pairwise(names):
        lines.append(f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]")
    return "\n".join(lines) + "\n"


@case("'steps' appears twice")
def recipe_with_a_key_twice(place: Place) -> list[str]:
    return place.recipe("run: {steps: 3, steps: 300}\n")


@case("there is no setting 'rum'", "did you mean 'run'")
def recipe_with_an_unknown_section(place: Place) -> list[str]:
    return place.recipe("rum: {steps: 3}\ndata: {photos: x}\nmethod: {kind: lora}\noptim: {kind: adamw}\n")


setting("unknown_key", "run.stepz=3", words=("run.stepz", "did you mean 'run.steps'"))
setting("unknown_section", "rum.steps=3", words=("rum", "did you mean 'run'"))
setting("wrong_type", "run.steps=many", words=("run.steps", "'many'", "whole number"))
setting("absurd_steps", "run.steps=100000000000000000000", words=("run.steps", "999,999"))
setting("absurd_class_images", "prior.count=1000000000", words=("prior.count", "100,000"))
setting("more_drawing_steps_than_timesteps", "sample.steps=5000", words=("sample.steps is 5,000", "1,000"))
setting("more_prior_steps_than_timesteps", "prior.steps=5000", words=("prior.steps is 5,000", "1,000"))
setting("negative_steps", "run.steps=-3", words=("run.steps", "-3", "at least 1"))
setting("zero_batch", "run.batch_size=0", words=("run.batch_size", "0"))
setting("negative_lr", "optim.lr=-1", words=("optim.lr", "-1"))
setting("lr_not_a_number", "optim.lr=.nan", words=("optim.lr", "nan"))
setting("lr_infinite", "optim.lr=.inf", words=("optim.lr", "inf"))
setting("unknown_method", "method.kind=lorra", words=("method", "lorra", "lora"))
setting("unknown_optimiser", "optim.kind=lion", words=("optim", "lion", "adamw8bit"))
setting("unknown_prior", "prior.kind=classes", words=("prior", "classes", "class_images"))
setting("key_of_another_kind", "method.kind=full", "method.rank=4", words=("method.rank",))
setting("dropout_of_one", "method.dropout=1", words=("method.dropout", "less than 1"))
setting(
    "oft_on_convolutions", "method.kind=oft", "method.targets=conv", words=("method.targets", "conv", "all-linear")
)
setting(
    "key_of_another_adapter",
    "method.kind=loha",
    "method.dropout=0.1",
    words=("method.dropout", "it belongs to dora and lora", "Leave it out"),
)
setting("lokr_factor_of_one", "method.kind=lokr", "method.factor=1", words=("method.factor is 1", "2"))
setting("oft_blocks_of_one", "method.kind=oft", "method.block_size=1", words=("method.block_size is 1", "2"))
setting("start_that_changes_the_base", "method.init=pissa", words=("method.init is 'pissa'", "gaussian"))
setting("rank_of_an_exported_lora", "export.rank=4", words=("export.rank is 4", "finetune resize"))
setting("max_error_of_nothing", "export.max_error=0", words=("export.max_error is 0", "more than 0"))
setting("export_rank_zero", "export.rank=0", words=("export.rank is 0", "1"))
setting("unknown_part", "method.parts=[unet]", words=("method.parts", "unet", "denoiser"))
setting("no_part", "method.parts=[]", words=("method.parts", "at least 1"))
setting("accumulation_does_not_divide", "run.batch_size=3", "run.accumulate=2", words=("3", "2", "multiple"))
setting("more_micro_batches_than_samples", "run.accumulate=4", words=("run.batch_size 1", "multiple"))
setting("text_lr_without_text_encoders", "optim.text_lr=1e-5", words=("optim.text_lr", "text_encoders"))
setting(
    "paged_without_gpu", "optim.kind=paged_adamw8bit", words=("paged_adamw8bit", "NVIDIA GPU", "optim.kind=adamw8bit")
)
setting("fp16_without_gpu", "run.precision=fp16", words=("fp16", "no CUDA GPU", "run.precision=fp32"))
setting(
    "deterministic_and_compiled", "run.deterministic=true", "run.compile=regional",
    words=("run.deterministic is true", "run.compile is 'regional'", "run.compile=off"),
)  # fmt: skip
setting("tf32_without_gpu", "run.tf32=true", words=("run.tf32", "no NVIDIA GPU", "leave it out"))
setting("more_processes_than_started", "run.processes=4", words=("run.processes is 4", "--processes 4"))
setting("no_class_noun", "data.class_noun=null", words=("data.class_noun", "dog"))
setting("resolution_not_divisible", "data.resolution=33", words=("data.resolution", "33", "32"))
setting("resolution_not_of_buckets", "data.resolution=34", "data.shape=buckets", words=("34", "shape=buckets", "32"))
setting("shape_unknown", "data.shape=round", words=("data.shape", "round", "buckets"))
setting("bucket_tolerance_absurd", "data.bucket_tolerance=2", words=("data.bucket_tolerance", "2"))
setting("resolution_zero", "data.resolution=0", words=("data.resolution", "0"))
setting("resolution_absurd", "data.resolution=100000", words=("data.resolution", "100000"))
setting("unknown_sampler", "sample.sampler=dpm+", words=("sample.sampler", "dpm+", "dpm++"))
setting("unknown_prior_sampler", "prior.sampler=magic", words=("prior.sampler", "magic", "euler"))
setting("unknown_export", "export.formats=[kohia]", words=("kohia", "did you mean 'kohya'"))
setting(
    "prediction_contradicts_the_base", "objective.prediction=v_prediction", words=("v_prediction", "epsilon", "auto")
)
setting("token_in_pieces", "data.token=unknownword", words=("'unknownword'", "pieces", "tokens suggest"))
setting("token_empty", "data.token=''", words=("data.token",))
setting("override_without_value", "run.steps", words=("'run.steps'", "section.key=value"))
setting("override_not_yaml", "data.templates=[", words=("data.templates=[", "YAML"))
setting("class_images_of_nothing", "prior.folder=/nowhere/at/all", "prior.count=0", words=("prior.count", "0"))


# run folders


@case("exists and is not a run folder", "run.dir=PATH")
def run_dir_is_something_else(place: Place) -> list[str]:
    (place.path / "run").mkdir()
    (place.path / "run" / "thesis.txt").write_text("mine")
    return place.train()


@case("run", "run.dir=PATH")
def run_dir_is_a_file(place: Place) -> list[str]:
    (place.path / "run").write_text("mine")
    return place.train()


@case("another recipe", "optim.lr", "run.dir=PATH")
def run_dir_of_another_recipe(place: Place) -> list[str]:
    return place.train("run.steps=2", "prior.kind=none", "optim.lr=0.5", f"run.dir={place.done()}")


@case("another recipe", "run.steps")
def run_dir_with_fewer_steps(place: Place) -> list[str]:
    return place.train("run.steps=1", "prior.kind=none", f"run.dir={place.done()}")


@case("/sys/finetune", "could not be")
def run_dir_read_only(place: Place) -> list[str]:
    return [item if not item.startswith("run.dir") else "run.dir=/sys/finetune" for item in place.train()]


@case("/proc/finetune", "could not be")
def run_dir_that_can_not_be(place: Place) -> list[str]:
    return [item if not item.startswith("run.dir") else "run.dir=/proc/finetune" for item in place.train()]


@case("not a run folder", "recipe.yaml")
def resume_of_no_run(place: Place) -> list[str]:
    return ["resume", str(place.photos)]


@case("recipe.yaml", "not valid YAML")
def resume_of_a_spoilt_run(place: Place) -> list[str]:
    (place.photos / "recipe.yaml").write_text("data: [")
    return ["resume", str(place.photos)]


@case("not a run folder")
def export_of_no_run(place: Place) -> list[str]:
    return ["export", str(place.photos)]


@case("not a run folder")
def report_of_no_run(place: Place) -> list[str]:
    return ["report", str(place.photos)]


@case("class images", "manifest", "remove")
def class_images_with_a_spoilt_manifest(place: Place) -> list[str]:
    folder = place.path / "classes"
    folder.mkdir()
    (folder / "manifest.json").write_text("[]")
    return place.train(f"prior.folder={folder}")


# bases


@case("is not a local folder", "hub", "check the name")
def base_not_on_the_hub(place: Place) -> list[str]:
    return place.train("base=nobody/nothing")


@case("'/nowhere' is not a folder", "hub id")
def base_missing(place: Place) -> list[str]:
    return place.train("base=/nowhere")


@case("has no model_index.json")
def base_is_another_folder(place: Place) -> list[str]:
    return place.train(f"base={place.photos}")


@case("model_index.json", "JSON")
def base_index_broken(place: Place) -> list[str]:
    (place.own_base() / "model_index.json").write_text("{")
    return place.train()


@case("unet/config.json", "complete diffusers folder")
def base_without_unet(place: Place) -> list[str]:
    shutil.rmtree(place.own_base() / "unet")
    return place.train()


@case("unet/config.json", "JSON")
def base_unet_config_broken(place: Place) -> list[str]:
    (place.own_base() / "unet" / "config.json").write_text("not json")
    return place.train()


@case("vae/config.json", "complete diffusers folder")
def base_without_vae(place: Place) -> list[str]:
    shutil.rmtree(place.own_base() / "vae")
    return place.train()


@case("text_encoder/config.json")
def base_without_text_encoder(place: Place) -> list[str]:
    shutil.rmtree(place.own_base() / "text_encoder")
    return place.train()


@case("tokenizer")
def base_without_tokenizer(place: Place) -> list[str]:
    shutil.rmtree(place.own_base() / "tokenizer")
    return place.train()


@case("tokenizer", "vocab.json")
def base_with_an_empty_tokenizer(place: Place) -> list[str]:
    for file in (place.own_base() / "tokenizer").glob("*"):
        file.unlink()
    return place.train()


@case("scheduler_config.json", "what the base predicts")
def base_without_scheduler(place: Place) -> list[str]:
    shutil.rmtree(place.own_base() / "scheduler")
    return place.train()


@case("KandinskyPipeline", "supported are")
def base_of_another_class(place: Place) -> list[str]:
    index = place.own_base() / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "KandinskyPipeline"}))
    return place.train()


@case("9 input channels", "supported are")
def base_for_inpainting(place: Place) -> list[str]:
    edit(place.own_base() / "unet" / "config.json", in_channels=9)
    return place.train()


@case("'noise_and_x0'", "epsilon, v_prediction")
def base_that_predicts_something_else(place: Place) -> list[str]:
    edit(place.own_base() / "scheduler" / "scheduler_config.json", prediction_type="noise_and_x0")
    return place.train()


@case("squaredcos", "supported")
def base_with_an_unknown_schedule(place: Place) -> list[str]:
    edit(place.own_base() / "scheduler" / "scheduler_config.json", beta_schedule="squaredcos_cap_v3")
    return place.train()


@case("unet", "pickle", "--allow-pickle")
def base_pickle_only(place: Place) -> list[str]:
    folder = place.own_base() / "unet"
    (file,) = folder.glob("*.safetensors")
    torch.save(load_file(file), folder / "diffusion_pytorch_model.bin")
    file.unlink()
    return place.train()


@case("unet", "weights")
def base_weights_truncated(place: Place) -> list[str]:
    (file,) = (place.own_base() / "unet").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:5000])
    return place.train()


@case("text_encoder", "weights")
def base_text_weights_truncated(place: Place) -> list[str]:
    (file,) = (place.own_base() / "text_encoder").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3000])
    return place.train()


@case("unet", "do not fit")
def base_of_mixed_shapes(place: Place) -> list[str]:
    edit(place.own_base() / "unet" / "config.json", layers_per_block=2, cross_attention_dim=24)
    return place.train()


@case("text_encoder", "do not fit")
def base_text_encoder_of_mixed_shapes(place: Place) -> list[str]:
    config = place.own_base() / "text_encoder" / "config.json"
    edit(config, hidden_size=2 * json.loads(config.read_text())["hidden_size"])
    return place.train()


@case("text encoder", "unet")
def base_with_the_text_encoder_of_another(place: Place) -> list[str]:
    base = place.own_base()
    shutil.rmtree(base / "text_encoder")
    shutil.copytree(place.bases["sdxl"] / "text_encoder_2", base / "text_encoder")
    return place.train()


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# adapters


def kohya(place: Place, name: str = "sd1") -> dict[str, torch.Tensor]:
    """A small kohya file's tensors for one module of a family."""
    part = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    config = json.loads((place.bases[name] / "unet" / "config.json").read_text())
    width = config["block_out_channels"][-1]
    return {
        f"{part}.lora_down.weight": torch.ones(2, width),
        f"{part}.lora_up.weight": torch.ones(width, 2),
        f"{part}.alpha": torch.tensor(2.0),
    }


def adapter(place: Place, tensors: dict[str, torch.Tensor], **metadata: str) -> list[str]:
    save_file(tensors, place.path / "a.safetensors", metadata=metadata or None)
    return place.sample(place.path / "a.safetensors")


@case("there is no file", "/nowhere")
def adapter_missing(place: Place) -> list[str]:
    return place.sample(Path("/nowhere.safetensors"))


@case("is not a LoRA", "encoder.conv_in.weight")
def adapter_is_a_vae(place: Place) -> list[str]:
    return adapter(place, {"encoder.conv_in.weight": torch.ones(4, 4)})


@case("a.safetensors")
def adapter_truncated(place: Place) -> list[str]:
    command = adapter(place, kohya(place))
    content = (place.path / "a.safetensors").read_bytes()
    (place.path / "a.safetensors").write_bytes(content[:-20])
    return command


@case("a.safetensors")
def adapter_empty(place: Place) -> list[str]:
    (place.path / "a.safetensors").touch()
    return place.sample(place.path / "a.safetensors")


@case("a.pt", "not a .safetensors file")
def adapter_is_a_pickle(place: Place) -> list[str]:
    torch.save(kohya(place), place.path / "a.pt")
    return place.sample(place.path / "a.pt")


@case("lora_te2_text_model_encoder_layers_0_mlp_fc1", "fit nothing in sd1")
def adapter_of_another_family(place: Place) -> list[str]:
    name = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    parts = {".lora_down.weight": torch.ones(2, 8), ".lora_up.weight": torch.ones(8, 2), ".alpha": torch.tensor(2.0)}
    return adapter(place, {name + end: value for end, value in parts.items()})


@case("to_q")
def adapter_without_up(place: Place) -> list[str]:
    return adapter(place, {key: value for key, value in kohya(place).items() if "lora_up" not in key})


@case("to_q", "99 to 32", "--base")
def adapter_of_another_width(place: Place) -> list[str]:
    tensors = kohya(place)
    key = next(key for key in tensors if "lora_down" in key)
    return adapter(place, tensors | {key: torch.ones(2, 99)})


@case("to_q", "NaN or infinite")
def adapter_with_nan(place: Place) -> list[str]:
    return adapter(place, {key: value * float("nan") for key, value in kohya(place).items()})


# commands


@case("sampler", "magic", "euler")
def sample_with_an_unknown_sampler(place: Place) -> list[str]:
    save_file(kohya(place), place.path / "a.safetensors")
    return [*place.sample(place.path / "a.safetensors"), "--sampler", "magic"]


@case("--steps", "at least 1")
def sample_without_steps(place: Place) -> list[str]:
    return [*place.sample(place.photos), "--steps", "0"]


@case("--count", "at least 1")
def sample_of_no_pictures(place: Place) -> list[str]:
    return [*place.sample(place.photos), "--count", "0"]


@case("--class-noun")
def dreambooth_without_a_noun(place: Place) -> list[str]:
    return ["dreambooth", str(place.photos)]


@case("no recipe 'nothing'")
def recipes_show_unknown(place: Place) -> list[str]:
    return ["recipes", "show", "nothing"]


@case("mine.yaml already exists")
def recipes_copy_onto_a_file(place: Place) -> list[str]:
    (place.path / "mine.yaml").touch()
    return ["recipes", "copy", "demo", str(place.path / "mine.yaml")]


@case("'/nowhere' is not a folder")
def tokens_of_no_base(place: Place) -> list[str]:
    return ["tokens", "suggest", "--base", "/nowhere"]


@case("No such command", "trian")
def unknown_command(place: Place) -> list[str]:
    return ["trian", "demo"]


# several subjects


def second(place: Place, text: str, *overrides: str, recipe: str = "dreambooth-lora") -> list[str]:
    """A second subject in a folder of its own, `text` is what is said of it beside that."""
    folder = place.path / "second"
    shutil.copytree(place.photos, folder)
    return place.train(f"data.subjects=[{{photos: {folder}, {text}}}]", *overrides, recipe=recipe)


@case("the token 'sks' is given to two subjects", "give each its own")
def token_of_two_subjects(place: Place) -> list[str]:
    return second(place, "class_noun: ball, token: SKS", "data.token=sks")


@case("there is no folder", "/nowhere/second", "give the folder")
def second_subject_without_a_folder(place: Place) -> list[str]:
    return place.train("data.subjects=[{photos: /nowhere/second, class_noun: ball}]")


@case("holds the photos of two subjects", "a folder of its own")
def folder_of_two_subjects(place: Place) -> list[str]:
    return place.train(f"data.subjects=[{{photos: {place.photos}, class_noun: ball}}]")


@case("second 1 of 4 files", "zero.png (empty file)", "--skip-bad")
def second_subject_with_a_bad_photo(place: Place) -> list[str]:
    arguments = second(place, "class_noun: ball")
    (place.path / "second" / "zero.png").touch()
    return arguments


@case("in ", "second: no caption was found for 0.png, 1.png, 2.png", "data.captions=auto")
def second_subject_without_captions(place: Place) -> list[str]:
    arguments = second(place, "class_noun: ball", "data.captions=files")
    for number in range(3):
        (place.photos / f"{number}.txt").write_text("a {token} {noun}")
    return arguments


@case("second has no class_noun", "class_noun: dog")
def second_subject_without_a_noun(place: Place) -> list[str]:
    return second(place, "token: sks")


@case("'data.subjects.0.photos' is missing: give it in the recipe")
def second_subject_without_photos(place: Place) -> list[str]:
    return place.train("data.subjects=[{class_noun: ball}]")


@case("'data.subjects.0.noun'", "did you mean 'data.subjects.0.class_noun'")
def second_subject_with_an_unknown_key(place: Place) -> list[str]:
    return second(place, "noun: ball")


@case("'unknownword'", "pieces", "tokens suggest")
def second_token_in_pieces(place: Place) -> list[str]:
    return second(place, "class_noun: ball, token: unknownword")


@case("prior.folder", "several class nouns", "leave it out")
def class_images_of_two_nouns_in_one_folder(place: Place) -> list[str]:
    return second(place, "class_noun: ball", f"prior.folder={place.path / 'classes'}")


@case("method.kind textual_inversion trains a word for only one", "method.kind=lora")
def one_word_for_two_subjects(place: Place) -> list[str]:
    return second(place, "class_noun: ball", "method.kind=textual_inversion")


@case("method.kind pivotal trains a word for only one", "a run of its own")
def one_pivot_for_two_subjects(place: Place) -> list[str]:
    return second(place, "class_noun: ball", "method.kind=pivotal")


def test_there_are_enough() -> None:
    assert len(CASES) >= 500


NOTES = {"status.json", "run.lock.txt", "run.lock"}  # what a run writes about itself whatever becomes of it
PYDANTIC = ("instance of", "nput should", "unable to parse", "string should", "tuple should", "object to extract")


def tree(folder: Path) -> dict[str, object]:
    """What is there. Of a run that was finished before: what its files hold, since a resumed one writes them again."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        if not path.is_relative_to(folder / "done"):
            found[str(path)] = path.lstat().st_mtime_ns
        elif path.name not in NOTES:
            found[str(path)] = path.read_bytes() if path.is_file() else path.is_dir()
    return found


@pytest.fixture(scope="session")
def finished(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint of each."""
    home = tmp_path_factory.mktemp("finished")
    place = Place(home, write_photos(home / "photos"), tiny_bases, tiny_bases["sd1"], home / "run")
    assert run(
        [*place.train("run.steps=2", "prior.kind=none", "run.checkpoint_every=1", "export.formats=[kohya]")]
    ) == (0, "")
    return home / "run"


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_left(
    name: str,
    tiny_bases: dict[str, Path],
    photos: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = CASES[name]
    arguments = make(Place(tmp_path, photos, tiny_bases, tiny_bases["sd1"], finished))
    before = tree(tmp_path)
    capfd.readouterr()
    code, message = run(arguments)
    said = message or capfd.readouterr().err
    assert code == 2, said
    assert said.count("rror: ") == 1, said
    assert all(word in said for word in words), said
    assert not any(word in said for word in PYDANTIC), said
    assert "dreambooth-lora.yaml" not in said, "what was typed is blamed on the shipped recipe"
    sentence = said.split("rror: ", 1)[1].strip()
    assert "\n" not in sentence, said
    assert len(sentence) < 500, said
    sentence.encode()
    assert tree(tmp_path) == before


# what is accepted, and how


def accepted(kind: str, folder: Path) -> None:
    file = folder / "odd.png"
    square = Image.effect_noise((48, 48), 90)
    match kind:
        case "cmyk":
            square.convert("CMYK").save(file.with_suffix(".tiff"))
        case "sixteen_bit":
            Image.fromarray(np.arange(48 * 48, dtype=np.uint16).reshape(48, 48) * 20).save(file)
        case "palette":
            square.convert("P").save(file)
        case "alpha":
            square.convert("RGBA").save(file)
        case "animated":
            square.convert("P").save(file.with_suffix(".gif"), save_all=True, append_images=[Image.new("P", (48, 48))])
        case "rotated":
            exif = Image.Exif()
            exif[0x0112] = 6
            square.convert("RGB").save(file.with_suffix(".jpg"), exif=exif)
        case "long_name":
            square.save(folder / ("n" * 240 + ".png"))
        case "capital_suffix":
            square.save(folder / "ODD.PNG")
        case "bom_caption":
            (folder / "0.txt").write_text("\ufeffa photo of {token} mug", encoding="utf-8")


KINDS = (
    "cmyk",
    "sixteen_bit",
    "palette",
    "alpha",
    "animated",
    "rotated",
    "long_name",
    "capital_suffix",
    "bom_caption",
)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_but_good_photos_are_taken(
    kind: str, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    accepted(kind, photos)
    place = Place(tmp_path, photos, tiny_bases, tiny_bases["sd1"], tmp_path)
    code, message = run([*place.train(), "--dry-run"])
    assert (code, message) == (0, "")
    assert "\ufeff" not in capfd.readouterr().out


def test_skip_bad_goes_on_and_says_how_many(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (photos / "a.png").touch()
    (photos / "b.jpg").write_text("b")
    place = Place(tmp_path, photos, tiny_bases, tiny_bases["sd1"], tmp_path)
    assert run([*place.train("run.steps=1", "prior.kind=none"), "--skip-bad"])[0] == 0
    said = capfd.readouterr().out
    assert "2 of 5 files" in said
    assert "a.png" in said
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["photos"]) == 3


def test_without_prompts_nothing_is_drawn(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    place = Place(tmp_path, photos, tiny_bases, tiny_bases["sd1"], tmp_path)
    options = ("run.steps=1", "prior.kind=none", "sample.prompts=[]", "export.verify=off", "export.formats=[kohya]")
    assert run(place.train(*options)) == (0, "")
    assert list((tmp_path / "run").rglob("*.safetensors"))
    assert not list((tmp_path / "run" / "samples").rglob("*.png"))
    assert (tmp_path / "run" / "report.html").is_file()


def test_allow_pickle_reads_a_pickled_base(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """Tensors only: torch.load(weights_only=True) runs no code (the next test)."""
    place = Place(tmp_path, photos, tiny_bases, tiny_bases["sd1"], tmp_path)
    base_pickle_only(place)
    assert run([*place.train(), "--dry-run"])[0] == 2
    assert run([*place.train(), "--dry-run", "--allow-pickle"]) == (0, "")
    assert run([*place.train(), "--dry-run"])[0] == 2, "the permission is for one command"


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("hacked",)


def test_allow_pickle_still_runs_no_code(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path, photos, tiny_bases, tiny_bases["sd1"], tmp_path)
    base_pickle_only(place)
    torch.save({"conv_in.weight": Evil()}, place.base / "unet" / "diffusion_pytorch_model.bin")
    code, message = run([*place.train(), "--dry-run", "--allow-pickle"])
    assert code == 2, message
    assert "unet" in message
    assert not (tmp_path / "hacked").exists()
