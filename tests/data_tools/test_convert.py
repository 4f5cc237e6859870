"""convert: the same images, captions and columns through every format and back, and settings of other trainers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_photos
from PIL import Image
from test_work import state

from data_tools.__main__ import main
from data_tools.convert import PACKED, convert, convert_settings
from data_tools.items import DataSetOptions, read_items
from data_tools.packed import parts
from finetune.config.load import load_recipe, parse_recipe
from finetune.core.errors import BadInput
from finetune.data.captions import caption_files
from finetune.data.photos import scan
from finetune.data.sources.registry import open_source

CAPTIONS = ["a red square, sks", 'two, with "quotes" and\u00e4', None]


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Three photos; two have captions, one a further column and a mask, and a file is no image."""
    folder = write_photos(tmp_path / "photos")
    rows = [
        {"file_name": "0.png", "text": CAPTIONS[0], "licence": "CC0", "stars": 3},
        {"file_name": "1.png", "text": CAPTIONS[1]},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "bad.jpg").write_bytes(b"no image")
    shutil.copy(folder / "0.png", folder / "0.mask.png")
    return folder


def content(source: Path, kind: str = "auto") -> dict[str, tuple[str, str | None, dict[str, Any]]]:
    """Name -> SHA-256 of the image, caption and columns, of whatever is there."""
    found = read_items(source, DataSetOptions(kind))
    return {
        item.name: (hashlib.sha256(item.read()).hexdigest(), item.caption, dict(item.row))
        for item in found.items
        if not item.fault
    }


@pytest.mark.parametrize("to", ["captions", "jsonl", "csv", "imagefolder", "parquet", "webdataset"])
def test_every_format_holds_the_same_and_goes_back(to: str, captioned: Path, tmp_path: Path) -> None:
    wanted, before, out = content(captioned), state(captioned), tmp_path / "out"
    assert convert(captioned, out, to, dry_run=True).counts == {
        ("packed" if to in PACKED else "written"): 3,
        "left out": 1,
    }
    assert not out.exists()
    done = convert(captioned, out, to)
    assert state(captioned) == before
    kind = "imagefolder" if to == "imagefolder" else "auto"
    again = content(out, kind)
    assert again.keys() == wanted.keys()
    for name, (digest, caption, row) in wanted.items():
        assert again[name][:2] == (digest, caption)
        if to not in ("captions", "csv"):
            assert {key: value for key, value in again[name][2].items() if value is not None} == row
    convert(out, tmp_path / "back", "jsonl", DataSetOptions(kind))
    assert caption_files(tmp_path / "back", scan(tmp_path / "back")) == {"0.png": CAPTIONS[0], "1.png": CAPTIONS[1]}
    notes = " ".join(done.plan.notes)
    assert ("1 masks" in notes) == (to in (*PACKED, "imagefolder"))
    assert (out / "0.mask.png").is_file() == (to not in (*PACKED, "imagefolder"))
    assert ("licence, stars are left out" in notes) == (to == "captions")
    assert "1 of 4 photos" in notes or "2 of 4 photos" in notes
    assert main(["--undo", str(out)]) == 0
    assert not out.exists()


@pytest.mark.parametrize("to", PACKED)
def test_training_reads_what_was_packed(to: str, captioned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(captioned, out, to)
    table = open_source(out).table
    assert table is not None
    assert [photo.digest for photo in table.photos] == [
        hashlib.sha256((captioned / f"{number}.png").read_bytes()).hexdigest() for number in range(3)
    ]
    assert table.captions == [[text] if text else [] for text in CAPTIONS]


def test_images_of_two_formats_are_in_one_set_of_shards(captioned: Path, tmp_path: Path) -> None:
    """`datasets` wants one ending in all samples; their bytes stay as they are."""
    Image.open(captioned / "2.png").save(captioned / "2.jpg")
    (captioned / "2.png").unlink()
    done = convert(captioned, tmp_path / "out", "webdataset")
    assert "1 images of another format are named .png" in done.plan.notes[1]
    assert content(tmp_path / "out").keys() == {"0.png", "1.png", "2.jpg"}


def test_a_phones_jpeg_with_a_second_picture_keeps_a_name_that_training_reads(photos: Path, tmp_path: Path) -> None:
    """It was written as 0.mpo, which nothing reads."""
    stills = [Image.open(file).convert("RGB") for file in sorted(photos.iterdir())]
    (tmp_path / "phone").mkdir()
    stills[0].save(tmp_path / "phone" / "0.jpg", format="MPO", save_all=True, append_images=stills[1:])
    convert(tmp_path / "phone", tmp_path / "packed", "parquet")
    convert(tmp_path / "packed", tmp_path / "back", "captions")
    assert [photo.path.name for photo in scan(tmp_path / "back")] == ["0.jpg"]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "gif", "bmp", "tiff", "avif", "heic"])
def test_an_image_that_ends_early_is_named(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was packed without a word, and training then refused it."""
    if ending == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    (tmp_path / "photos").mkdir()
    noise = Image.effect_noise((64, 48), 90).convert("RGB")
    noise.save(tmp_path / "photos" / f"whole.{ending}")
    stored = (tmp_path / "photos" / f"whole.{ending}").read_bytes()
    (tmp_path / "photos" / f"cut.{ending}").write_bytes(stored[: -len(stored) // 4])
    assert main(["convert", str(tmp_path / "photos"), str(tmp_path / "out"), "--to", "jsonl"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"cut.{ending}: "))
    assert line.startswith(f"cut.{ending}: left out (")
    assert [file.name for file in (tmp_path / "out").glob(f"*.{ending}")] == [f"whole.{ending}"]
    monkeypatch.setattr("data_tools.endings.image_of", lambda *_: pytest.fail("a whole file was decoded"))
    if ending not in ("bmp", "tiff"):  # these do not say where they end
        (tmp_path / "photos" / f"cut.{ending}").unlink()
        convert(tmp_path / "photos", tmp_path / "again", "jsonl")


def test_a_row_that_ends_early_is_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow
    from pyarrow import parquet

    stored = [file.read_bytes() for file in sorted(photos.iterdir())]
    stored[1] = stored[1][: len(stored[1]) // 2]
    images = [{"bytes": each, "path": None} for each in stored]
    parquet.write_table(pyarrow.table({"image": images}), tmp_path / "set.parquet")
    done = convert(tmp_path / "set.parquet", tmp_path / "out", "webdataset")
    left = [step.line for step in done.plan.steps if step.action == "left out"]
    assert left == ["row 1: left out (truncated)"]
    monkeypatch.setattr("data_tools.show.SHOWN", 1)
    assert main(["convert", str(tmp_path / "set.parquet"), str(tmp_path / "files"), "--to", "jsonl"]) == 0
    assert capsys.readouterr().out.startswith("row 1: left out (truncated)\n... and 2 more\n")


def test_files_are_as_large_as_was_asked_and_the_same_each_time(captioned: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(captioned, tmp_path / name, "webdataset", largest=1)
    names = sorted(file.name for file in (tmp_path / "one").glob("*.tar"))
    assert names == [f"train-{number:05d}.tar" for number in range(3)]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)
    items = read_items(captioned).items
    assert [len(part) for part in parts(items, 10**9)] == [4]


def test_rows_of_several_captions_and_odd_names(tmp_path: Path, photos: Path) -> None:
    """Further captions become columns, which data.caption_mix reads; names that no disk can have become numbers."""
    import pyarrow
    from pyarrow import parquet

    names = ["../../etc/a.png", "ok name.png", "x:y.png"]
    images = [{"bytes": (photos / f"{n}.png").read_bytes(), "path": names[n]} for n in range(3)]
    table = {"image": images, "captions": [["a", "b"], ["c"], None], "embedding": [b"\x00", b"\x01", None]}
    parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    done = convert(tmp_path / "x.parquet", tmp_path / "out", "jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": "a.png", "text": "a", "captions_2": "b"}, {"file_name": "ok name.png", "text": "c"}]
    assert sorted(file.name for file in (tmp_path / "out").glob("*.png")) == ["00002.png", "a.png", "ok name.png"]
    assert "embedding: left out where it holds bytes" in done.plan.notes[0]


@pytest.fixture
def kohyas(tmp_path: Path) -> Path:
    home = tmp_path / "kohya"
    (home / "img").mkdir(parents=True)
    (home / "reg").mkdir()
    write_photos(home / "img" / "10_sks dog")
    write_photos(home / "reg" / "1_dog")
    (home / "img" / "10_sks dog" / "0.txt").write_text("sks dog, grass, sky")
    return home


def test_kohyas_folders_become_a_recipe(kohyas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(kohyas)
    assert main(["convert", str(kohyas), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "num_repeats = 10: no counterpart" in told
    assert "base = None: no counterpart (the settings name no base: give --base" in told
    recipe = load_recipe(str(tmp_path / "out" / "recipe.yaml"))
    data = recipe.data
    assert (data.photos.name, data.token, data.class_noun) == ("10_sks dog", "sks", "dog")
    assert data.templates == ["{token} {noun}"]
    assert (recipe.prior.kind, recipe.prior.folder.name, recipe.prior.count) == ("class_images", "1_dog", 3)  # type: ignore[union-attr]
    assert recipe.prior.prompts == ["{noun}"]
    assert state(kohyas) == before
    assert main(["--undo", str(tmp_path / "out")]) == 0


def test_kohyas_further_folders_are_subjects_with_repeats(kohyas: Path, tmp_path: Path) -> None:
    write_photos(kohyas / "img" / "3_zwx cat")
    write_photos(kohyas / "img" / "2_sks poodle")
    done = convert_settings(kohyas, tmp_path / "out")
    assert done.recipe["data"]["repeats"] == 10
    assert [(s["token"], s["class_noun"], s["repeats"]) for s in done.recipe["data"]["subjects"]] == [
        ("zwx", "cat", 3)
    ]


TOML = """
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1
[[datasets]]
resolution = [512, 768]
batch_size = 4
keep_tokens = 2
enable_bucket = true
  [[datasets.subsets]]
  image_dir = "img/10_sks dog"
  class_tokens = "sks dog"
  num_repeats = 10
  caption_dropout_rate = 0.05
  caption_prefix = "masterpiece, "
  [[datasets.subsets]]
  is_reg = true
  image_dir = "reg/1_dog"
  class_tokens = "dog"
  keep_tokens = 3
"""
FLAGS = r"""#!/bin/bash
# my run
export MODEL=runwayml/stable-diffusion-v1-5
accelerate launch --num_cpu_threads_per_process 1 train_network.py \
  --pretrained_model_name_or_path="$MODEL" --dataset_config="set.toml" \
  --output_dir=out --output_name="my dog" --network_module=networks.lora --network_dim=8 \
  --network_args "conv_dim=8" "conv_alpha=1" --learning_rate=1e-4 --text_encoder_lr 5e-5 \
  --optimizer_type="AdamW8bit" --optimizer_args weight_decay=0.1 "betas=0.9,0.99" \
  --lr_scheduler=cosine --lr_warmup_steps=10 --max_train_epochs=6 --save_every_n_epochs=2 --clip_skip=2 \
  --mixed_precision="fp16" --gradient_checkpointing --min_snr_gamma 5 --noise_offset 0.05 --xformers
"""


def test_kohyas_flags_with_their_dataset(kohyas: Path, tmp_path: Path) -> None:
    (kohyas / "set.toml").write_text(TOML)
    (kohyas / "train.sh").write_text(FLAGS)
    done = convert_settings(kohyas / "train.sh", tmp_path / "out")
    recipe = parse_recipe(done.recipe)
    assert recipe.base.source == "runwayml/stable-diffusion-v1-5"
    data, run, optim, method = recipe.data, recipe.run, recipe.optim, recipe.method
    assert (data.resolution, data.shape, data.shuffle_tags, data.keep_tags) == (640, "buckets", True, 2)
    assert (data.caption_dropout, data.token, data.photos) == (0.05, "sks", (kohyas / "img" / "10_sks dog").absolute())
    # 3 photos, 10 times, in batches of 4: 8 steps an epoch
    assert (run.steps, run.checkpoint_every, run.batch_size, run.name, run.precision) == (48, 16, 4, "my dog", "fp16")
    assert (optim.kind, optim.lr, optim.text_lr, optim.schedule, optim.warmup) == (
        "adamw8bit",
        1e-4,
        5e-5,
        "cosine",
        10,
    )
    assert (optim.weight_decay, optim.betas) == (0.1, (0.9, 0.99))  # type: ignore[union-attr]
    assert (method.rank, method.alpha, method.targets, method.parts) == (8, 1.0, "conv", ["denoiser", "text_encoders"])  # type: ignore[union-attr]
    assert recipe.objective.weighting.gamma == 5
    assert recipe.prior.folder.name == "1_dog"  # type: ignore[union-attr]
    left = {line.key: line for line in done.lines if line.action == "no counterpart"}
    assert {
        "clip_skip",
        "caption_prefix",
        "xformers",
        "output_dir",
        "network_args.conv_alpha",
        "num_repeats",
    } <= left.keys()
    assert left["general.keep_tokens"].value == 1
    text = (tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8")
    assert "# no counterpart: clip_skip = 2 (a base's own config says it)" in text


ONE_TRAINER = {
    "training_method": "LORA", "model_type": "STABLE_DIFFUSION_XL_10_BASE", "epochs": 4, "batch_size": 2,
    "base_model_name": "stabilityai/stable-diffusion-xl-base-1.0",
    "output_model_destination": "models/lora.safetensors",
    "learning_rate": 0.0003, "learning_rate_warmup_steps": 1, "lora_rank": 32, "ema": "CPU", "resolution": "1024",
    "optimizer": {"optimizer": "ADAMW_8BIT", "weight_decay": 0.02, "stochastic_rounding": True},
    "text_encoder": {"train": False}, "loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 5.0,
    "debug_mode": False, "learning_rate_scheduler": "REX",
}  # fmt: skip


def test_one_trainers_json_with_its_concepts(kohyas: Path, tmp_path: Path) -> None:
    photos = kohyas / "img" / "10_sks dog"
    text = {"enable_tag_shuffling": True, "keep_tags_count": 2, "prompt_source": "sample"}
    concepts = [
        {
            "path": str(photos),
            "balancing": 3.0,
            "loss_weight": 0.5,
            "text": text,
            "image": {"enable_random_flip": True},
        },
        {"path": "elsewhere", "enabled": False},
    ]
    (kohyas / "one.json").write_text(json.dumps(ONE_TRAINER | {"concepts": concepts}))
    done = convert_settings(kohyas / "one.json", tmp_path / "out")
    recipe = parse_recipe(done.recipe)
    data, optim, method = recipe.data, recipe.optim, recipe.method
    assert (data.photos, data.weights, data.shuffle_tags, data.keep_tags) == (photos, {"*": 0.5}, True, 2)
    assert (data.flip, data.shape, data.resolution, recipe.run.ema) == (True, "buckets", 1024, 0.999)
    assert (recipe.run.steps, recipe.run.name) == (20, "lora")  # 3 photos, 3 times, in batches of 2: 5 steps an epoch
    assert (optim.kind, optim.weight_decay, method.rank, method.alpha) == ("adamw8bit", 0.02, 32, 1.0)  # type: ignore[union-attr]
    assert method.parts == ["denoiser"]
    left = {line.key: line.value for line in done.lines if line.action == "no counterpart"}
    assert left["learning_rate_scheduler"] == "REX"
    assert left["concept"] == "elsewhere"
    assert left["optimizer.stochastic_rounding"] is True
    assert "concepts[0].balancing" in left  # of one folder
    assert data.repeats == 1
    assert "debug_mode" in {line.key for line in done.lines if line.action == "off"}


@pytest.mark.parametrize(("second", "expected"), [(2.0, [None, None]), (3.0, [2, 3])])
def test_only_repeats_that_differ_are_carried_over(
    second: float, expected: list[int | None], kohyas: Path, tmp_path: Path
) -> None:
    concepts = [
        {"path": str(kohyas / "img" / "10_sks dog"), "balancing": 2.0},
        {"path": str(kohyas / "reg" / "1_dog"), "balancing": second},
    ]
    (kohyas / "one.json").write_text(json.dumps(ONE_TRAINER | {"concepts": concepts}))
    data = convert_settings(kohyas / "one.json", tmp_path / "out").recipe["data"]
    assert [data.get("repeats"), data["subjects"][0].get("repeats")] == expected


AI_TOOLKIT = """
job: extension
config:
  name: "my_first_flux_lora_v1"
  process:
    - type: 'sd_trainer'
      training_folder: "output"
      trigger_word: "p3r5on"
      network: {type: "lora", linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4}
      datasets:
        - folder_path: "img/10_sks dog"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          keep_tokens: 1
          resolution: [512, 768, 1024]
      train:
        {batch_size: 1, steps: 2000, gradient_accumulation_steps: 2, train_text_encoder: false, lr: 1e-4,
         noise_scheduler: "flowmatch", optimizer: "adamw8bit", dtype: bf16,
         ema_config: {use_ema: true, ema_decay: 0.99}}
      model: {name_or_path: "black-forest-labs/FLUX.1-dev", is_flux: true, quantize: true}
      sample: {sample_every: 250, guidance_scale: 4, sample_steps: 20, prompts: ["[trigger] holding a sign"]}
meta: {version: '1.0'}
"""


def test_ai_toolkits_yaml(kohyas: Path, tmp_path: Path) -> None:
    (kohyas / "flux.yaml").write_text(AI_TOOLKIT)
    done = convert_settings(kohyas / "flux.yaml", tmp_path / "out")
    recipe = parse_recipe(done.recipe)
    assert (recipe.base.source, recipe.run.name) == ("black-forest-labs/FLUX.1-dev", "my_first_flux_lora_v1")
    assert (recipe.data.token, recipe.data.trigger, recipe.data.resolution) == ("p3r5on", ", {token}", 1024)
    assert (recipe.run.batch_size, recipe.run.accumulate, recipe.run.ema, recipe.run.keep) == (2, 2, 0.99, 4)
    assert recipe.sample.prompts == ["{token} holding a sign"]
    left = {line.key for line in done.lines if line.action == "no counterpart"}
    assert {"datasets[0].resolution", "keep_tokens", "model.quantize", "train.noise_scheduler", "meta"} <= left


SHELL = """export INSTANCE_DIR="img/10_sks dog"
accelerate launch train_dreambooth_lora_sdxl.py \\
  --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 --instance_data_dir="$INSTANCE_DIR" \\
  --with_prior_preservation --class_data_dir=reg/1_dog --class_prompt="a photo of dog" --num_class_images=200 \\
  --instance_prompt="a photo of sks dog" --resolution=1024 --train_batch_size=1 --gradient_accumulation_steps=4 \\
  --learning_rate=1e-4 --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=500 --use_8bit_adam \\
  --validation_prompt="A photo of sks dog in a bucket" --seed="0" --report_to="wandb" --push_to_hub
"""


def test_a_shell_line_of_diffusers(kohyas: Path, tmp_path: Path) -> None:
    (kohyas / "run.sh").write_text(SHELL)
    done = convert_settings(kohyas / "run.sh", tmp_path / "out")
    recipe = parse_recipe(done.recipe)
    assert (recipe.data.token, recipe.data.class_noun) == ("sks", "dog")
    assert recipe.data.templates == ["a photo of {token} {noun}"]
    assert (recipe.prior.prompts, recipe.prior.count) == (["a photo of {noun}"], 3)  # type: ignore[union-attr]
    assert (recipe.run.batch_size, recipe.run.accumulate, recipe.run.steps) == (4, 4, 500)
    assert (recipe.method.rank, recipe.optim.kind, recipe.data.crop) == (4, "adamw8bit", "random")  # type: ignore[union-attr]
    assert recipe.sample.prompts == ["A photo of {token} {noun} in a bucket"]
    left = {line.key for line in done.lines if line.action == "no counterpart"}
    assert {"report_to", "push_to_hub"} <= left


def test_the_number_of_class_images_goes_with_their_folder(kohyas: Path, tmp_path: Path) -> None:
    """Three is how many lie in the folder: without it the base draws as many as it usually does."""
    write_photos(kohyas / "img" / "10_zwx cat")
    done = convert_settings(kohyas, tmp_path / "several")
    assert {"kind", "prompt"} <= done.recipe["prior"].keys()
    assert not {"folder", "count"} & done.recipe["prior"].keys()
    left = [line.why for line in done.lines if line.action == "no counterpart" and line.why]
    assert "it was the number of these class images" in left
    assert any("there are several class nouns" in why for why in left)


def test_class_images_that_are_not_there_leave_no_number(kohyas: Path, tmp_path: Path) -> None:
    """Of a shell line the number stays that it gives: the base draws so many."""
    shutil.rmtree(kohyas / "reg")
    (kohyas / "set.toml").write_text(TOML)
    (kohyas / "run.sh").write_text(SHELL)
    done = convert_settings(kohyas / "set.toml", tmp_path / "toml")
    assert not {"folder", "count"} & done.recipe["prior"].keys()
    assert "no images are there: the base draws class images" in [line.why for line in done.lines]
    shell = convert_settings(kohyas / "run.sh", tmp_path / "shell")
    assert ("folder" in shell.recipe["prior"], shell.recipe["prior"]["count"]) == (False, 200)


@pytest.mark.parametrize("text", [FLAGS, SHELL], ids=["kohya", "diffusers"])
def test_every_setting_that_was_given_is_named(text: str, kohyas: Path, tmp_path: Path) -> None:
    (kohyas / "set.toml").write_text(TOML)
    (kohyas / "run.sh").write_text(text)
    done = convert_settings(kohyas / "run.sh", tmp_path / "out")
    from data_tools.trainers.reading import flags

    named = " ".join(line.key for line in done.lines)
    apart = {"dataset_config", "network_args", "optimizer_args", "script"}  # each of their parts is named
    missing = [key for key in flags(text, Path("x")) if key not in named and key not in apart]
    assert missing == []


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "x = ", "not valid TOML"),
        ("a.toml", "[general]\nx = 1", "no settings of a trainer"),
        ("a.json", '{"a": 1}', "no settings of a trainer"),
        ("a.yaml", "config: {process: []}", "config.process is empty"),
        ("a.sh", "echo hello", "no command with flags"),
        ("a.sh", "train.py --a 'b", "close its quotes"),
        ("a.toml", "[[datasets]]\nresolution=512", "names no folder of photos"),
        ("a.sh", "train_dreambooth.py --instance_prompt x", "names no folder of photos"),
    ],
)
def test_settings_that_can_not_be_read_are_one_sentence(
    name: str, text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["convert", str(tmp_path / name), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (error.count("\n"), words in error) == (1, True), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{photos}", "out"], "say what to write with --to"),
        (["{photos}", "out", "--to", "jsonl", "--reg", "x"], "--reg has no effect"),
        (["{photos}", "out", "--to", "jsonl", "--split", "x"], "--split is for data sets"),
        (["{photos}", "out", "--to", "recipe"], "no folder such as '10_sks dog'"),
        (["{photos}", "out", "--to", "jsonl", "--source", "x"], "--source is 'x'"),
        (["/nowhere", "out", "--to", "jsonl"], "/nowhere"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(
    arguments: list[str], words: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *(text.format(photos=photos) for text in arguments)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert words in error[0], error
    with pytest.raises(BadInput, match="'x' is unknown"):
        convert(photos, tmp_path / "out", "x")


def test_the_recipe_of_a_conversion_is_whole_yaml(kohyas: Path, tmp_path: Path) -> None:
    done = convert_settings(kohyas, tmp_path / "out", base="tiny")
    held = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8"))
    assert held == done.recipe
    assert held["base"]["source"] == "tiny"
