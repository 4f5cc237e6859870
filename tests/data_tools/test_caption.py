"""caption: models of the true classes with random weights, taggers, templates; the originals stay."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_captioners
from PIL import Image
from test_work import state

from data_tools import captioners
from data_tools.__main__ import main
from data_tools.caption import CaptionRules, Wording, caption
from data_tools.captioners import Asked, Captioner, Model, chosen_tags, read_tags, tagger_input
from data_tools.dedupe import dedupe
from data_tools.photo_set import read_set
from data_tools.resize import resize
from finetune.core.errors import BadInput
from finetune.data.captions import caption_files
from finetune.data.mixes import mix_captions
from finetune.data.photos import scan

TAGGER = (
    "CAg6lQIKMgoBeBIBbSIKUmVkdWNlTWVhbioNCgRheGVzQAFAAqABByoPCghrZWVwZGltcxgAoAECChEKAW0KAXcSAXAiBk1hdE11"
    "bAoOCgFwCgFiEgFxIgNBZGQKDwoBcRIBeSIHU2lnbW9pZBIBdCpTCAMIBhABQgF3SkjNzMw8AAAAAAAAAAAAAAAAAAAAAM3MzLwA"
    "AAAAzczMPAAAAAAAAAAAzczMPAAAAAAAAAAAAAAAAM3MzDzNzMw8AAAAAAAAAAAqIQgGEAFCAWJKGAAAQMAAAEDAAABAwAAAQMAA"
    "AEDAAABAwFobCgF4EhYKFAgBEhAKAggBCgIICAoCCAgKAggDYhMKAXkSDgoMCAESCAoCCAEKAggGQgQKABAN"
)


class Counting(Captioner):
    """A stand-in for the parts that do not depend on the network: it says how large the image is."""

    name = ""

    def __init__(self, folder: Path) -> None:
        self.name, self.seen = str(folder), 0

    def describe(self, image: Image.Image) -> str:
        self.seen += 1
        red, _, _ = image.getpixel((0, 0))  # type: ignore[misc]
        return f"an image of {image.width} pixels, red {red}"


@pytest.fixture
def captioned(photos: Path) -> Path:
    (photos / "0.txt").write_text("sks, red hair")
    (photos / "1.txt").write_text("sks, blue")
    return photos


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "network").mkdir()
    return Counting(tmp_path / "network")


def random_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["blip2", "llava", "florence2", "qwen2_vl"])
def test_models_of_the_true_classes_describe_images(kind: str, tmp_path: Path) -> None:
    """The words of a random model mean nothing; but they are words of its own, and the same each time."""
    folder = getattr(tiny_captioners, f"write_{kind}")(tmp_path / kind)
    model = Model(str(folder), Asked(tokens=5, device="cpu"))
    text = model.describe(random_image())
    words = {*tiny_captioners.WORDS, *(f"word{number}" for number in range(24))}
    assert 0 < len(text.split()) <= 5
    assert set(text.split()) <= words - {"<image>", "USER", "<pad>", "<s>", "</s>"}
    assert Model(str(folder), Asked(tokens=5, device="cpu")).describe(random_image()) == text


def images_of_many_shapes() -> list[Image.Image]:
    draw = np.random.default_rng(5)
    sizes = {(40, 48): 255, (16, 16): 50, (64, 24): 150, (24, 64): 230, (33, 31): 100}
    return [Image.fromarray(draw.integers(0, light, (*size, 3), dtype=np.uint8)) for size, light in sizes.items()]


@pytest.mark.parametrize(
    ("kind", "scale"), [("blip2", 1), ("llava", 25), ("joycaption", 25), ("florence2", 25), ("qwen2_vl", 25)]
)
def test_captions_of_a_batch_are_those_of_each_image_alone(kind: str, scale: float, tmp_path: Path) -> None:
    """Also where the images of one batch have different numbers of tokens (Qwen), and where captions end after
    different numbers of words (BLIP-2). Larger random weights make more of the images."""
    folder = getattr(tiny_captioners, f"write_{kind}")(tmp_path / kind)
    images, model = images_of_many_shapes(), Model(str(folder), Asked(tokens=12, device="cpu"))
    for values in model.model.parameters():
        if values.ndim > 1:
            values.data.mul_(scale)
    alone = [model.describe(image) for image in images]
    assert len(set(alone)) >= 3
    assert model.describe_all(images) == alone


def test_a_batch_that_does_not_fit_into_the_memory_is_halved(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    folder = tiny_captioners.write_llava(tmp_path / "llava")
    seen: list[int] = []
    limit = 2
    together = Model._together

    def short_of_memory(model: Model, images: list[Image.Image]) -> list[str]:
        seen.append(len(images))
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return together(model, images)

    monkeypatch.setattr(Model, "_together", short_of_memory)
    arguments = ["caption", str(photos), "--model", str(folder), "--max-tokens", "2", "--device", "cpu"]
    assert main([*arguments, str(tmp_path / "out"), "--batch-size", "3"]) == 0
    assert seen == [3, 2, 1]
    assert "3 images did not fit into the memory together: 2 at a time did" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.synthetic.txt"))) == 3
    limit = 0
    assert main([*arguments, str(tmp_path / "none"), "--max-tokens", "3"]) == 2
    assert "needs more memory for one image than cpu has" in capsys.readouterr().err


def test_a_chat_template_and_a_question_are_used(tmp_path: Path) -> None:
    """What is asked is in the input, and not in the caption."""
    model = Model(str(tiny_captioners.write_joycaption(tmp_path / "joy")), Asked("a red dog", 3, "cpu"))
    inputs = model._inputs([random_image()])
    asked = model.processor.batch_decode(inputs["input_ids"])[0]
    assert asked.split()[-5:] == ["a", "red", "dog", "ASSISTANT", ":"]
    assert asked.split().count("<image>") == 4
    assert len(model.describe(random_image()).split()) <= 3


def test_a_model_writes_beside_the_originals(captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    before, out = state(captioned), tmp_path / "out"
    folder = tiny_captioners.write_llava(tmp_path / "llava")
    arguments = ["caption", str(captioned), str(out), "--model", str(folder), "--max-tokens", "4", "--device", "cpu"]
    assert main([*arguments, "--dry-run"]) == 0
    assert not out.exists()
    assert main([*arguments, "--as", "blip", "--template", "sks, {caption}"]) == 0
    assert state(captioned) == before
    assert (out / "0.txt").read_text() == "sks, red hair"
    assert all((out / f"{number}.blip.txt").read_text().startswith("sks, ") for number in range(3))
    parts = mix_captions(out, scan(out), {"own": 1, "blip": 1}, [])
    assert [len(part) for part in parts] == [2, 2, 1]
    assert main(["--undo", str(out)]) == 0
    assert not out.exists()


def test_new_words_replace_the_own_ones_which_stay_as_originals(captioned: Path, tmp_path: Path) -> None:
    before, out = state(captioned), tmp_path / "out"
    arguments = ["caption", str(captioned), str(out), "--replace", "sks", "zwx", "--template", "{caption}, of {name}"]
    assert main(arguments) == 0
    assert caption_files(out, scan(out)) == {
        "0.png": "zwx, red hair, of 0.png", "1.png": "zwx, blue, of 1.png",
    }  # fmt: skip
    assert (out / "0.original.txt").read_text() == "sks, red hair\n"
    assert not (out / "2.original.txt").exists()
    assert state(captioned) == before


def test_captions_of_a_list_get_columns(photos: Path, tmp_path: Path, counting: Counting) -> None:
    rows = [{"file_name": f"{number}.png", "text": f"nr {number}", "licence": "CC0"} for number in range(2)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    caption(photos, tmp_path / "out", CaptionRules("blip"), counting)
    found = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert found[0] == rows[0] | {"blip": "an image of 48 pixels, red 200"}
    mix = mix_captions(tmp_path / "out", scan(tmp_path / "out"), {"own": 1, "blip": 3}, [])
    assert mix[1] == [("nr 1", 1), ("an image of 48 pixels, red 30", 3)]
    assert mix[2] == [("an image of 48 pixels, red 30", 3)]
    rewritten = CaptionRules("own", Wording((("nr", "number"),)))
    caption(photos, tmp_path / "own", rewritten)
    found = [json.loads(line) for line in (tmp_path / "own" / "metadata.jsonl").read_text().splitlines()]
    assert found[1] == {"file_name": "1.png", "text": "number 1", "licence": "CC0", "original": "nr 1"}


def test_a_share_of_the_photos_is_captioned_anew(captioned: Path, tmp_path: Path, counting: Counting) -> None:
    done = caption(captioned, tmp_path / "out", CaptionRules("own", share=0.67), counting)
    assert done.counts == {"captioned anew": 2, "copied": 1}
    assert counting.seen == 2
    again = caption(captioned, tmp_path / "again", CaptionRules("own", share=0.67), counting)
    assert [step.action for step in again.plan.steps] == [step.action for step in done.plan.steps]


def test_what_a_network_wrote_is_known_after_an_interruption(
    captioned: Path, tmp_path: Path, counting: Counting
) -> None:
    describe = counting.describe

    def interrupted(image: Image.Image) -> str:
        if counting.seen == 2:
            raise KeyboardInterrupt
        return describe(image)

    counting.describe = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        caption(captioned, tmp_path / "out", CaptionRules(), counting)
    assert not (tmp_path / "out").exists()
    counting.describe = describe  # type: ignore[method-assign]
    done = caption(captioned, tmp_path / "out", CaptionRules(), counting)
    assert (counting.seen, done.counts) == (3, {"captioned": 3})
    (tmp_path / "network" / "weights").write_text("others")
    caption(captioned, tmp_path / "third", CaptionRules(), counting)
    assert counting.seen == 6


def test_other_commands_take_further_captions_along(captioned: Path, tmp_path: Path, counting: Counting) -> None:
    (captioned / "broken.jpg").write_bytes(b"no image")
    done = caption(captioned, tmp_path / "one", CaptionRules("blip"), counting)
    why = next(step.why for step in done.plan.steps if step.source.name == "broken.jpg")
    assert why.startswith("not described")
    (tmp_path / "one" / "broken.jpg").unlink()
    resize(tmp_path / "one", tmp_path / "two", 30)
    dedupe(tmp_path / "two", tmp_path / "three")
    further = [file.name for entry in read_set(tmp_path / "three").entries for file in entry.further]
    assert further == ["0.blip.txt", "1.blip.txt", "2.blip.txt"]
    from data_tools.check import check

    assert not any("blip" in problem for problem in [*check(tmp_path / "three", 30).problems])


def test_braces_of_a_caption_are_no_places() -> None:
    wording = Wording(template="{name}: {caption}, {token}")
    assert wording.apply("a {name} on {caption}", "0.png") == "0.png: a {name} on {caption}, {token}"


def test_a_template_leaves_a_photo_without_a_caption_as_it_is(captioned: Path, tmp_path: Path) -> None:
    """It became "sks,", which training took in place of its own templates."""
    (captioned / "1.txt").unlink()
    assert main(["caption", str(captioned), str(tmp_path / "out"), "--template", "sks, {caption}"]) == 0
    assert not (tmp_path / "out" / "1.txt").exists()
    assert (tmp_path / "out" / "0.txt").read_text(encoding="utf-8").startswith("sks, ")


def test_a_regular_expression_replaces() -> None:
    wording = Wording(((r"\b(\w+) hair", r"hair that is \1"),), True, "{caption}!")
    assert wording.apply("red hair", "a") == "hair that is red!"
    assert Wording((("a.c", "x"),)).apply("abc a.c", "n") == "abc x"


def test_the_input_and_the_tags_of_a_tagger(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 8), (10, 20, 30))
    values = tagger_input(image, 8)
    assert (values.shape, values.dtype) == ((1, 8, 8, 3), np.float32)
    assert values[0, 4, 4].tolist() == [30, 20, 10]
    assert values[0, 4, 0].tolist() == [255, 255, 255]
    (tmp_path / "tags.csv").write_text(
        "tag_id,name,category,count\n1,safe,9,3\n2,red_hair,0,2\n3,^_^,0,1\n4,miku,4,1\n"
    )
    tags = read_tags(tmp_path / "tags.csv")
    assert tags == [("safe", "9"), ("red hair", "0"), ("^_^", "0"), ("miku", "4")]
    assert chosen_tags([0.9, 0.5, 0.8, 0.4], tags, 0.35) == ["miku", "^_^", "red hair"]
    assert chosen_tags([0.9, 0.5, 0.8, 0.4], tags, 0.45) == ["^_^", "red hair"]
    (tmp_path / "tags.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="columns name and category"):
        read_tags(tmp_path / "tags.csv")


@pytest.fixture
def tagger(tmp_path: Path) -> Path:
    """Weights that a person can follow: the tag of a colour is more probable the more of it an image has."""
    folder = tmp_path / "tagger"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(base64.b64decode(TAGGER))
    rows = "1,bluish,0,1\n2,greenish,0,1\n3,reddish,0,1\n4,red_thing,0,1\n5,sonic,4,1\n6,safe,9,1\n"
    (folder / "selected_tags.csv").write_text(f"tag_id,name,category,count\n{rows}")
    return folder


def test_a_tagger_runs_through_onnxruntime(
    tagger: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    for number, colour in enumerate(((250, 0, 0), (0, 250, 0), (0, 0, 250))):
        Image.new("RGB", (16, 16), colour).save(photos / f"{number}.png")
    assert main(["caption", str(photos), str(tmp_path / "out"), "--tagger", str(tagger), "--as", "own"]) == 0
    texts = caption_files(tmp_path / "out", scan(tmp_path / "out"))
    assert texts == {"0.png": "red thing, reddish", "1.png": "sonic, greenish", "2.png": "bluish"}


def test_a_tagger_that_does_not_fit_into_memory_is_not_called_damaged(
    tagger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    (tagger / "model.onnx").write_bytes(b"no model")
    with pytest.raises(BadInput, match="copy it again"):
        captioners.Tagger(str(tagger), 0.3)

    def full(*given: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(runtime, "InferenceSession", full)
    with pytest.raises(MemoryError):
        captioners.Tagger(str(tagger), 0.3)


def test_without_onnxruntime_it_is_one_sentence(
    tagger: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["caption", str(photos), str(tmp_path / "out"), "--tagger", str(tagger)]) == 2
    assert "pip install 'finetune-diffusion[tagger]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --model, --tagger, --template or --replace"),
        (["--prompt", "x", "--template", "{caption}"], "--prompt has no effect"),
        (["--batch-size", "2", "--template", "{caption}"], "--batch-size has no effect"),
        (["--threshold", "0.2", "--template", "{caption}"], "--threshold has no effect"),
        (["--regex", "--template", "a {caption}"], "--regex has no effect"),
        (["--replace", "(", "x", "--regex"], "no regular expression"),
        (["--template", "a {caption}", "--as", "a b"], "can't name captions"),
        (["--template", "a {caption}", "--as", "templates"], "can't name captions"),
        (["--template", "a {caption}", "--as", "x", "--share", "0.5"], "--share chooses photos"),
        (["--template", "a {caption}", "--share", "0"], "--share is 0"),
        (["--replace", "nothing", "x"], "'nothing' of --replace is in none of them"),
        (["--replace", "", "x"], "would write between all letters"),
        (["--template", "{captoin}, sks"], "{captoin}, which is not a known placeholder"),
        (["--model", "/nowhere"], "there is no /nowhere"),
        (["--model", "{photos}"], "holds no config.json"),
    ],
)
def test_bad_input_of_caption_is_one_sentence(
    arguments: list[str], words: str, captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [text.replace("{photos}", str(captioned)) for text in arguments]
    assert main(["caption", str(captioned), str(tmp_path / "out"), *own]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert words in error[0], error
    assert not (tmp_path / "out").exists()


def test_a_model_that_describes_no_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadInput, match="type 'bert', which describes no images"):
        Model(str(tmp_path), Asked())
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(BadInput, match="can't be loaded"):
        Model(str(tmp_path), Asked())


def test_no_code_of_a_model_runs_and_no_pickle_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    seen: dict[str, Any] = {}
    folder = tiny_captioners.write_blip2(tmp_path / "m")
    load = transformers.AutoModelForImageTextToText.from_pretrained

    def watched(*given: Any, **options: Any) -> Any:
        seen.update(options)
        return load(*given, **options)

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", watched)
    Model(str(folder), Asked(device="cpu"))
    assert seen["use_safetensors"] is True
    assert not seen.get("trust_remote_code")
    assert "*.py" not in captioners.PATTERNS
