"""`finetune evaluate` as a person meets it: on a small Stable Diffusion with a trained LoRA and small networks."""

from __future__ import annotations

import csv
import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import write_photos
from networks import write_chain, write_clip, write_dino
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from finetune.cli.main import run
from finetune.core.files import sha256
from finetune.evaluation.backbones.convnets import vgg19
from finetune.evaluation.base import Kind
from finetune.evaluation.prompts_file import Called, live_nouns, prompts_for, templates
from finetune.evaluation.registry import BACKBONES, chosen_metrics
from finetune.families.digests import base_hash

PROMPTS = "# two of our own\na {token} {noun}\n\na {token} {noun} on the beach\n"
UNDRAWN = ("--prompts", "--size")  # what these tests give, and nothing is drawn with
TRAINED = ("run.steps=2", "optim.lr=1e-2", "optim.warmup=0", "prior.kind=none", "sample.count=1", "sample.steps=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_bases: dict[str, Path]) -> Path:
    """Photos, networks, a run of two steps on a small SD1, and a file with prompts."""
    root = tmp_path_factory.mktemp("evaluate")
    photos = write_photos(root / "photos")
    write_dino(root / "dino")
    write_clip(root / "clip")
    (root / "prompts.txt").write_text(PROMPTS)
    told = ["dreambooth", str(photos), "--class-noun", "dog", "--base", str(tiny_bases["sd1"]), "data.token=zwx"]
    one = "sample.prompts=['a photo of {token}']"
    assert run([*told, *TRAINED, one, f"run.dir={root / 'dog'}"]) == (0, "")
    return root


def arguments(place: Path, *more: object, on: str = "photos") -> list[str]:
    networks = ["--dino", place / "dino", "--clip", place / "clip"]
    few = ["--prompts", place / "prompts.txt", "--count", 2, "--class-count", 3, "--steps", 1]
    return [str(word) for word in ("evaluate", "--on", place / on, *networks, *few, *more)]


def refused(words: list[str], *said: str, out: Path) -> None:
    """One sentence, exit code 2, and nothing written."""
    code, message = run([*words, "--out", str(out)])
    assert code == 2, message
    assert message.startswith("error: ")
    assert "\n" not in message
    assert all(word in message for word in said), message
    assert not out.exists()


def measured(out: Path) -> dict[str, dict[str, Any]]:
    """Metric -> source -> its values."""
    values = json.loads((out / "evaluation.json").read_text())
    return {item["name"]: {each["source"]: each for each in item["values"]} for item in values["metrics"]}


def features(folder: Path, files: list[Path]) -> np.ndarray:
    """By transformers alone."""
    processor = ViTImageProcessorPil.from_pretrained(folder)
    pixels = processor(images=[Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = transformers.AutoModel.from_pretrained(folder).eval()(pixel_values=pixels).last_hidden_state[:, 0]
    return found.double().numpy()


def mean_cosine(ones: np.ndarray, others: np.ndarray) -> float:
    pairs = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in product(ones, others)]
    return sum(pairs) / len(pairs)


@pytest.fixture(scope="module")
def result(place: Path, tiny_bases: dict[str, Path]) -> Path:
    """The run, its LoRA file and its PEFT folder, side by side."""
    out, exports = place / "result", place / "dog" / "exports"
    sources = [place / "dog", exports / "dog.safetensors", exports / "dog-peft", "--base", tiny_bases["sd1"]]
    words = ["--token", "zwx", "--class-noun", "dog"]  # a PEFT folder has no header
    assert run(arguments(place, *sources, *words, "--out", out)) == (0, "")
    return out


def test_the_numbers_are_those_of_the_images_that_were_drawn(result: Path, place: Path) -> None:
    values = json.loads((result / "evaluation.json").read_text())
    own = values["sources"][0]
    assert [prompt["text"] for prompt in own["prompts"]] == ["a zwx dog", "a zwx dog on the beach", "a photo of a dog"]
    assert [prompt["plain"] for prompt in own["prompts"]] == ["a dog", "a dog on the beach", "a photo of a dog"]
    assert [len(prompt["images"]) for prompt in own["prompts"]] == [2, 2, 3]
    photos = features(place / "dino", sorted((place / "photos").glob("*.png")))
    drawn = [features(place / "dino", [result / name for name in prompt["images"]]) for prompt in own["prompts"]]
    found = measured(result)
    by_hand = (mean_cosine(drawn[0], photos) + mean_cosine(drawn[1], photos)) / 2
    assert found["dino"]["dog"]["value"] == pytest.approx(by_hand, abs=1e-6)
    assert found["dino"]["dog"]["prompts"]["a zwx dog"] == pytest.approx(mean_cosine(drawn[0], photos), abs=1e-6)
    assert found["pres"]["dog"]["value"] == pytest.approx(mean_cosine(drawn[2], photos), abs=1e-6)
    assert set(found) == {"dino", "clip_i", "clip_t", "pres", "div_dino"}
    assert list(found["dino"]) == ["dog", "dog.safetensors", "dog-peft"]


def test_the_result_names_what_decided_it_and_no_folders(result: Path, place: Path, tiny_bases: dict) -> None:
    text = (result / "evaluation.json").read_text()
    values = json.loads(text)
    assert values["backbones"]["dino"] == {"name": "dino", "sha256": base_hash(place / "dino")}
    ran, file, _ = values["sources"]
    assert (ran["token"], ran["class_noun"], file["token"], file["class_noun"]) == ("zwx", "dog", "zwx", "dog")
    assert ran["base_hash"] == file["base_hash"] == base_hash(tiny_bases["sd1"])
    page = (result / "evaluation.html").read_text()
    assert str(place) not in text
    assert str(place) not in page
    for words in (
        "DINO",
        "PRES",
        "lower is better",
        "a dog on the beach",
        "dog.safetensors",
        base_hash(place / "dino"),
    ):
        assert words in page
    assert page.count("<img") == 3 + 3 * 7
    assert "http" not in page.replace("http-equiv", "")
    assert values["notes"] == [
        "dog: 3 of the 3 photos were trained on, so that a copy of one counts as likeness",
        "dog.safetensors, dog-peft: a file does not say whether the photos were trained on; if so, a copy of one "
        "counts as likeness",
    ]


def test_a_run_and_its_file_draw_almost_the_same(result: Path) -> None:
    """The file holds the LoRA in fp16."""
    found = measured(result)
    for metric in ("dino", "clip_i", "clip_t", "pres"):
        values = [item["value"] for item in found[metric].values()]
        assert len(values) == 3
        assert values[1:] == pytest.approx([values[0]] * 2, abs=2e-3)


def test_what_is_drawn_is_not_drawn_again(result: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(result, place / "again")
    images = sorted((out / "images").rglob("*.png"))
    before = {file: file.stat().st_mtime_ns for file in images}
    told = json.loads((out / "evaluation.json").read_text())["sources"][0]
    gone = out / told["prompts"][0]["images"][1]
    content = gone.read_bytes()
    gone.unlink()
    assert run(arguments(place, place / "dog", "--out", out)) == (0, "")
    after = {file: file.stat().st_mtime_ns for file in sorted((out / "images").rglob("*.png"))}
    assert {file for file in after if after[file] != before[file]} == {gone}
    assert gone.read_bytes() == content
    assert measured(out)["dino"]["dog"] == measured(result)["dino"]["dog"]
    assert "CLIP-T (higher is better)" in capsys.readouterr().out
    again = arguments(place, place / "dog", "--out", out, "--guidance", 3, "--metrics", "dino")
    assert run(again) == (0, "")
    assert "note: --clip is read by none of the chosen metrics" in capsys.readouterr().out
    assert len(list((out / "images").iterdir())) == 4  # the run, its exports, and the run at another guidance


def write_table(folder: Path, rows: list[tuple[str, ...]], head: tuple[str, ...] = ("file", "prompt")) -> Path:
    with (folder / "prompts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return folder


def test_images_of_others_count_without_a_run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The photos themselves, as if somebody had drawn them."""
    given = shutil.copytree(place / "photos", tmp_path / "theirs")
    head = ("prompt", "file", "group")
    rows = [("a zwx dog", "0.png", ""), ("a zwx dog", "1.png", "subject"), ("a photo of a dog", "2.png", "class")]
    write_table(given, rows, head)
    words = ["--images", given, "--token", "zwx", "--metrics", "dino,pres,clip_t,div_dino"]
    assert run(arguments(place, *words, "--size", 32, "--out", tmp_path / "out")) == (0, "")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == [f"note: {name} changes nothing, as the images of --images exist already" for name in UNDRAWN]
    values = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [prompt["plain"] for prompt in values["sources"][0]["prompts"]] == ["a dog", "a photo of a dog"]
    rows = features(place / "dino", sorted((place / "photos").glob("*.png")))
    found = measured(tmp_path / "out")
    assert found["dino"]["theirs"]["value"] == pytest.approx(mean_cosine(rows[:2], rows), abs=1e-6)
    assert found["pres"]["theirs"]["value"] == pytest.approx(mean_cosine(rows[2:], rows), abs=1e-6)
    assert found["div_dino"]["theirs"]["value"] == pytest.approx(1 - mean_cosine(rows[:1], rows[1:2]), abs=1e-6)
    assert found["dino"]["theirs"]["low"] is None  # one prompt has no spread over prompts
    assert run(arguments(place, place / "dog", *words[:2], "--metrics", "dino", "--out", tmp_path / "both")) == (0, "")
    notes = json.loads((tmp_path / "both" / "evaluation.json").read_text())["notes"]
    assert notes[-1:] == ["theirs: other prompts or numbers of images than dog: compare with care"]


def test_a_file_without_words_needs_them_and_takes_them(
    place: Path, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "theirs.safetensors"
    save_file(load_file(place / "dog" / "exports" / "dog.safetensors"), bare)
    words = arguments(place, bare, "--base", tiny_bases["sd1"])
    refused(words, "theirs.safetensors has no trigger phrase", "--token and --class-noun", out=tmp_path / "no")
    refused([*words, "--token", "zwx"], "--class-noun", out=tmp_path / "no")
    out = tmp_path / "out"
    told = ["--token", "zwx", "--class-noun", "dog", "--metrics", "dino", "--out", str(out)]
    assert run([*words, *told]) == (0, "")
    assert list(measured(out)["dino"]) == ["theirs.safetensors"]


def test_a_network_that_is_not_here_is_named_with_its_option(place: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(place / "dog"), "--on", str(place / "photos")]
    refused(words, "openai/clip-vit-base-patch32", "can't be fetched", "--clip DIR", out=tmp_path / "no")
    words += ["--clip", str(place / "clip")]
    refused(words, "facebook/dino-vits16", "can't be fetched", "--dino DIR", out=tmp_path / "no")
    refused([*words, "--metrics", "clip_t,gram"], "gram needs", "--vgg FILE", out=tmp_path / "no")


def test_what_can_not_be_evaluated_is_refused_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    for name in ("empty", "cut", "untold", "odd"):
        (tmp_path / name).mkdir()
    whole = (place / "photos" / "0.png").read_bytes()
    (tmp_path / "cut" / "0.png").write_bytes(whole[:-40])
    (tmp_path / "odd" / "0.png").write_bytes(whole)
    broken = shutil.copytree(tmp_path / "cut", tmp_path / "broken")
    write_table(broken, [("0.png", "a zwx dog")])
    write_table(tmp_path / "odd", [("1.png", "a zwx dog")])
    outside = write_table(shutil.copytree(tmp_path / "odd", tmp_path / "outside"), [("../odd/0.png", "a zwx dog")])
    wrong = write_table(shutil.copytree(tmp_path / "odd", tmp_path / "wrong"), [("0.png", "a")], ("name", "text"))
    (tmp_path / "none.txt").write_text("# nothing\n")
    (tmp_path / "brace.txt").write_text("a {tokn} dog\n")
    dog, photos = str(place / "dog"), str(place / "photos")
    cases: list[tuple[list[object], tuple[str, ...]]] = [
        ([], ("nothing to evaluate", "--images")),
        ([dog, "--metrics", "dnio"], ("no metric 'dnio'", "clip_t")),
        ([dog, "--metrics", ","], ("no metric", "clip_t")),
        ([dog, "--metrics", "div_dino", "--count", 1], ("div_dino", "--count 2")),
        ([dog, "--dino", place / "clip"], ("model_type 'clip'", "vit")),
        ([dog, "--on", tmp_path / "empty"], ("holds no images",)),
        ([dog, "--on", tmp_path / "cut"], ("0.png", "truncated")),
        ([dog, "--on", place / "photos" / "0.png"], ("is a file", "folder")),
        ([dog, "--on", tmp_path / "nowhere"], ("nowhere",)),
        ([photos, "--on", dog], ("is a run's folder", "before --on")),
        ([photos], ("is also the folder of photos",)),
        ([tmp_path / "odd"], ("neither a run's folder nor an adapter", "--images")),
        ([tmp_path / "nowhere.safetensors"], ("nowhere.safetensors",)),
        ([dog, "--token", "abc"], ("--token", "a run knows its own words")),
        ([dog, "--step", 7], ("7",)),
        ([dog, "--base", "tiny"], ("--base", "its own base")),
        ([dog, "--kind", "stile"], ("no --kind 'stile'", "style")),
        ([dog, "--kind", "style"], ("learned a subject",)),
        ([dog, "--prompts", tmp_path / "none.txt"], ("0 prompts",)),
        ([dog, "--prompts", tmp_path / "brace.txt"], ("'{tokn}'", "{token}")),
        ([dog, "--prompts", tmp_path / "nowhere.txt"], ("no file", "--prompts")),
        ([dog, "--sampler", "eler"], ("eler",)),
        ([dog, "--size", 33], ("--size is 33",)),
        ([dog, "--steps", 5000], ("--steps is 5,000",)),
        (["--images", tmp_path / "untold"], ("prompts.csv", "file,prompt")),
        (["--images", tmp_path / "odd"], ("line 2", "'1.png'")),
        (["--images", wrong], ("columns", "file,prompt")),
        (["--images", outside], ("line 2", "leads out of")),
        (["--images", broken], ("0.png", "truncated")),
        (["--images", place / "prompts.txt"], ("no folder",)),
    ]
    for more, said in cases:
        refused(arguments(place, *more), *said, out=tmp_path / "no")
    refused(["evaluate", dog], "--on PHOTOS", out=tmp_path / "no")
    code, message = run(arguments(place, dog, "--out", tmp_path / "none.txt"))
    assert code == 2
    assert "is a file" in message


def test_a_style_is_measured_against_its_drawings(place: Path, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    vgg = write_chain(vgg19(), tmp_path / "vgg.safetensors")
    (tmp_path / "prompts.txt").write_text("a cat {style}\n")
    words = ["evaluate", place / "dog" / "exports" / "dog.safetensors", "--on", place / "photos", "--vgg", vgg]
    words += ["--clip", place / "clip", "--kind", "style", "--token", "in zwx style", "--count", 1, "--steps", 1]
    words += ["--base", tiny_bases["sd1"], "--prompts", tmp_path / "prompts.txt", "--metrics", "gram,clip_t"]
    out = tmp_path / "out"
    refused([*map(str, words[:-1]), "gram,pres"], "pres is about a class", out=out)
    assert run([*map(str, words), "--out", str(out)]) == (0, "")
    values = json.loads((out / "evaluation.json").read_text())
    prompt = values["sources"][0]["prompts"][0]
    assert (prompt["text"], prompt["plain"]) == ("a cat in zwx style", "a cat")
    eye = BACKBONES["vgg"].opened(str(vgg), "gram")
    rows, drawings = eye.see([out / prompt["images"][0]]), eye.see(sorted((place / "photos").glob("*.png")))
    by_hand = sum(((rows[0] - other) ** 2).sum() for other in drawings) / 3
    assert measured(out)["gram"]["dog.safetensors"]["value"] == pytest.approx(by_hand, rel=1e-6)


def test_metrics_that_fit_are_chosen_in_the_order_of_the_table() -> None:
    def names(kind: Kind, given: set[str]) -> list[str]:
        return [metric.name for metric in chosen_metrics(None, kind, given)]

    assert names("live", set()) == ["dino", "clip_i", "clip_t", "pres", "div_dino"]
    assert names("object", {"lpips", "copy"}) == ["dino", "clip_i", "clip_t", "pres", "div", "div_dino", "copies"]
    assert names("style", {"vgg", "csd"}) == ["clip_i", "csd", "gram", "clip_t", "div_dino"]
    assert [metric.name for metric in chosen_metrics("pres, dino,pres", "live", set())] == ["pres", "dino"]


def test_the_prompts_are_25_of_each_kind_and_fill_in() -> None:
    for kind in ("object", "live", "style"):
        texts = templates(None, kind)
        called = Called(style="in zwx style") if kind == "style" else Called("zwx", "dog")
        prompts = [called.prompt(text) for text in texts]
        assert len({prompt.text for prompt in prompts}) == 25
        assert all("zwx" in prompt.text and "zwx" not in prompt.plain for prompt in prompts)
        assert not any("{" in prompt.text or "  " in prompt.plain for prompt in prompts)
    assert {"dog", "woman", "cat"} <= live_nouns()
    assert [prompts_for(Called("zwx", noun)) for noun in ("mug", "small dog", "Cat")] == ["object", "live", "live"]
    assert prompts_for(Called(style="in zwx style")) == "style"


def test_a_word_that_was_trained_in_place_of_the_noun_is_asked_for_so() -> None:
    called = Called("<zwx>", "dog", alone=True)
    for text in templates(None, "live"):
        prompt = called.prompt(text)
        assert "<zwx>" in prompt.text
        assert "<zwx> dog" not in prompt.text
        assert prompt.plain == Called("zwx", "dog").prompt(text).plain
    assert called.plain("a <ZWX> in snow") == "a dog in snow"
    assert Called("zwx", "dog").plain("a ZWX dog, and no zwxs") == "a dog, and no zwxs", "as CLIP reads it"
    assert Called(style="in zwx style").plain("A cat, in ZWX style") == "A cat"
    own = called.prompt("a photo of {token} in snow")
    assert (own.text, own.plain) == ("a photo of <zwx> in snow", "a photo of dog in snow")
    assert (called.words, Called("zwx", "dog").words) == ("<zwx>", "zwx dog")


def test_one_photo_is_enough_and_has_no_number_among_photos(place: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(place / "photos" / "0.png", tmp_path / "one")
    words = arguments(place, place / "dog", "--out", tmp_path / "out")
    words[words.index("--on") + 1] = str(tmp_path / "one")
    assert run(words) == (0, "")
    text = (tmp_path / "out" / "evaluation.json").read_text()
    assert "NaN" not in text
    metrics = {item["name"]: item for item in json.loads(text)["metrics"]}
    assert metrics["dino"]["reference"] is None
    assert metrics["dino"]["values"][0]["value"] is not None


def test_a_file_for_another_base_is_refused_before_the_first_image(
    place: Path, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    wide = {f"{module}.lora_down.weight": torch.ones(2, 640), f"{module}.lora_up.weight": torch.ones(640, 2)}
    save_file(wide | {f"{module}.alpha": torch.tensor(2.0)}, tmp_path / "other.safetensors")
    words = ["--token", "zwx", "--class-noun", "dog", "--base", tiny_bases["sd1"]]
    given = arguments(place, place / "dog", tmp_path / "other.safetensors", *words)
    refused(given, "other.safetensors", out=tmp_path / "no")


def test_a_run_that_has_not_finished_is_measured_so_far_and_it_is_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = shutil.copytree(place / "dog", tmp_path / "dog")
    shutil.rmtree(half / "adapter")
    words = ["--metrics", "dino", "--dino", place / "dino"]
    assert run(arguments(place, half, place / "dog", *words, "--out", tmp_path / "out")) == (0, "")
    notes = json.loads((tmp_path / "out" / "evaluation.json").read_text())["notes"]
    assert "dog: the run has not finished: measured is its checkpoint of step 2" in notes
    assert "note: dog: the run has not finished" in capsys.readouterr().out
    assert list(measured(tmp_path / "out")["dino"]) == ["dog", "dog (2)"]
    shutil.rmtree(half / "checkpoints")
    refused(arguments(place, half), "has no checkpoint yet", out=tmp_path / "no")


def test_the_photos_of_the_training_are_named_as_such(
    place: Path, tmp_path: Path, tiny_bases: dict[str, Path]
) -> None:
    base = tiny_bases["sd1"]

    def notes(on: Path) -> list[str]:
        words = arguments(place, place / "dog", "--metrics", "dino", "--out", tmp_path / "out")
        words[words.index("--on") + 1] = str(on)
        assert run(words) == (0, "")
        return json.loads((tmp_path / "out" / "evaluation.json").read_text())["notes"]

    said = "dog: {} of the {} photos were trained on, so that a copy of one counts as likeness"
    own = [note for note in notes(place / "photos") if "trained on" in note]
    assert own == [said.format(3, 3)]
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(place / "photos" / "0.png", moved / "first.png")
    Image.effect_noise((40, 40), 80).convert("RGB").save(moved / "new.png")
    assert [note for note in notes(moved) if "trained on" in note] == [said.format(1, 2)]
    (moved / "first.png").unlink()
    assert not [note for note in notes(moved) if "trained on" in note]
    words = arguments(place, place / "dog" / "exports" / "dog.safetensors", "--base", base, "--metrics", "dino")
    assert run([*words, "--out", str(tmp_path / "file")]) == (0, "")
    of_file = json.loads((tmp_path / "file" / "evaluation.json").read_text())["notes"]
    assert "dog.safetensors: a file does not say whether the photos were trained on" in " ".join(of_file)
    pins = place / "dog" / "inputs.json"
    whole = pins.read_text(encoding="utf-8")
    values = json.loads(whole)
    values["inputs"] |= {"photos": [], "tables": [{"name": "set.parquet"}]}  # as an earlier version wrote it
    pins.write_text(json.dumps(values), encoding="utf-8")
    unknown = [note for note in notes(moved) if "trained on" in note]
    pins.write_text(whole, encoding="utf-8")
    said = "dog: its record does not say whether the photos were trained on; if so, a copy of one counts as likeness"
    assert unknown == [said]


@pytest.mark.slow
def test_drawings_follow_what_decides_them_and_damaged_ones_are_drawn_again(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folders: list[str] = []

    def drawn(*more: object, on: Path = place / "photos") -> int:
        """The number of folders of drawings afterwards."""
        few = ("--metrics", "dino", "--count", 1, "--class-count", 1, "--out", out)
        words = arguments(place, *(more or (place / "dog",)), *few)
        words[words.index("--on") + 1] = str(on)
        assert run(words) == (0, "")
        folders[:] = sorted(item.name for item in (out / "images").iterdir())
        return len(folders)

    dog = place / "dog"
    assert drawn() == 1
    other = tmp_path / "other"
    other.mkdir()
    Image.effect_noise((40, 40), 80).convert("RGB").save(other / "new.png")
    assert drawn(on=other) == 1  # photos are only looked at
    assert drawn(dog, "--seed", 5) == 1  # other files in the same folder
    assert len(list((out / "images" / folders[0]).iterdir())) == 6
    assert drawn(dog, "--sampler", "ddim") == 2
    assert drawn(dog, "--weight", 0.5) == 3
    assert drawn(dog, "--negative", "blurry") == 4
    changed = shutil.copytree(dog, tmp_path / "dog")
    weights = load_file(changed / "adapter" / "trained.safetensors")
    with safe_open(changed / "adapter" / "trained.safetensors", "pt") as held:
        about = held.metadata()
    save_file({name: 2 * value for name, value in weights.items()}, changed / "adapter" / "trained.safetensors", about)
    hashed = {"trained.safetensors": sha256(changed / "adapter" / "trained.safetensors")}
    (changed / "adapter" / "manifest.json").write_text(json.dumps(hashed))
    assert drawn(changed) == 5
    files = {file: file.read_bytes() for each in folders for file in (out / "images" / each).glob("*.png")}
    for file, content in files.items():
        file.write_bytes(content[:200])
    drawn(dog)
    drawn(dog, "--seed", 5)
    assert sum(file.read_bytes() == content for file, content in files.items()) == 6
