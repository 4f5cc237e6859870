"""The page: one file that stands alone, true to the run folder, and safe whatever the names are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from PIL import Image

from finetune.config.load import dump_recipe, load_recipe
from finetune.core.records import Check
from finetune.report.html import curve, smooth, write_report
from finetune.report.pictures import keep_class_images
from finetune.runs.inputs import Accepted, InputsRecord, RunInputs, write_inputs
from finetune.verdicts.rules import LIMITS


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("before", "after"):
        for prompt in range(2):
            file = tmp_path / "samples" / name / f"{prompt:02d}-0.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (prompt * 90, 10, 10)).save(file)
    info = {
        "token": "zwx", "class_noun": "<b>mug</b>", "family": "sd1", "base": "tiny", "resolution": 64,
        "prompts": ["a photo of zwx mug", "a & b"], "captions": [["a photo of zwx <b>mug</b>"]], "photos": [],
        "plan": {"steps": "2 of 1"},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(info))
    rows = [{"step": n, "loss": 1 / n, "lr": 1e-4, "grad_norm": 1.0, "seconds": 0.5} for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exported = {
        "format": "kohya", "path": "exports/x.safetensors", "size": 1000, "read_by": ["ComfyUI"],
        "checks": ["ok: 3 modules re-read", "FAILED: one is odd"],
    }  # fmt: skip
    (tmp_path / "exports.json").write_text(json.dumps([exported]))
    return tmp_path


def test_the_page_shows_what_the_run_folder_holds(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("<img") == 4 + 2 * 3  # both sections show before and after, one the difference too
    assert "3 steps, 0.50 s a step" in page
    assert 'class="good">ok: 3 modules re-read' in page
    assert 'class="bad">FAILED: one is odd' in page
    assert "exports/x.safetensors" in page
    assert page.count("<svg") == 2


def test_checks_as_records_decide_the_colour_and_not_their_words(run: Path) -> None:
    """exports.json as it is written now: `results` beside the lines."""
    checks = [Check("weights", True, "FAILED: is a word of this one"), Check("diffusers", False, "ok: of this")]
    item = json.loads((run / "exports.json").read_text())[0] | {"results": [check.values() for check in checks]}
    (run / "exports.json").write_text(json.dumps([item]))
    page = write_report(run).read_text(encoding="utf-8")
    assert 'class="good">ok: FAILED: is a word of this one' in page
    assert 'class="bad">FAILED: ok: of this' in page


def test_nothing_is_fetched_and_nothing_is_let_through(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert "<b>mug</b>" not in page
    assert "&lt;b&gt;mug&lt;/b&gt;" in page
    assert "a &amp; b" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert write_report(tmp_path).is_file()


def test_changes_that_were_accepted_are_shown(run: Path) -> None:
    assert "--accept-changes" not in write_report(run).read_text(encoding="utf-8")
    accepted = [Accepted(step=40, changes=["the photo <a>.png is not the same image", "torch is 3 and was 2"])]
    write_inputs(run, InputsRecord(inputs=RunInputs(), accepted=accepted))
    page = write_report(run).read_text(encoding="utf-8")
    assert "after step 40: the photo &lt;a&gt;.png is not the same image; torch is 3 and was 2" in page


def links(page: str) -> list[str]:
    return [unquote(target) for target in re.findall(r'<a href="([^"]*)"', page)]


def test_a_click_opens_the_image_itself_while_the_page_is_in_its_run(run: Path, tmp_path: Path) -> None:
    found = links(write_report(run).read_text(encoding="utf-8"))
    assert found == [f"samples/{when}/{n:02d}-0.png" for n in range(2) for when in ("before", "after")]
    assert all((run / target).is_file() for target in found)
    elsewhere = write_report(run, out=tmp_path / "other" / "page.html").read_text(encoding="utf-8")
    assert links(elsewhere) == []
    assert elsewhere.count("<img") == 4 + 2 * 3


def test_previews_class_images_and_how_they_were_drawn(run: Path) -> None:
    for step in range(1, 13):
        for prompt in range(2):
            file = run / "samples" / f"step-{step * 10:06d}" / f"{prompt:02d}-0.png"
            file.parent.mkdir(exist_ok=True)
            Image.new("RGB", (16, 16)).save(file)
    recipe = load_recipe("demo", ["sample.sampler=euler", "sample.steps=7", "sample.guidance=2.5", "sample.seed=3"])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    keep_class_images(run, sorted((run / "samples" / "before").glob("*.png")))
    page = write_report(run).read_text(encoding="utf-8")
    assert "Drawn with euler, 7 steps, guidance 2.5, seeds 3 to 6." in page
    assert page.count("<figcaption>before</figcaption>") == 2 + 2  # of the strip and of the differences
    shown = [int(step) for step in re.findall("<figcaption>step ([0-9]+)<", page)]
    assert shown[: len(shown) // 2] == shown[len(shown) // 2 :]
    assert (len(shown), shown[0], shown[7]) == (16, 10, 120)
    assert page.count('alt="class image"') == 2
    early = write_report(run, step=30, out=run / "early.html").read_text(encoding="utf-8")
    assert re.findall("<figcaption>step ([0-9]+)<", early) == ["10", "20", "30"] * 2


def test_smoothing_keeps_a_constant_and_has_no_bias_at_the_start() -> None:
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smooth([1.0, 2.0])[0] == 1.0


def test_a_curve_goes_through_its_points() -> None:
    """Loss 1 at the first step and 0 at the last: from the top of the plot (within 5 %) to its floor."""
    points = curve("loss", [0, 10], [1.0, 0.0]).split('points="')[1].split('"')[0].split()
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points)
    assert (x0, x1) == (70.0, 950.0)
    assert y1 == 164.0
    assert 24.0 <= y0 < 32.0


def test_the_verdict_is_a_sentence_and_curves(run: Path) -> None:
    """With what is known of the checkpoints; names that are no measure's are not shown."""
    rows = [{"step": 0, "learned": 0.0, "elsewhere": 0.0}, {"step": 50, "learned": 4.0, "elsewhere": 0.1}]
    rows += [{"step": 100, "learned": 5.0, "elsewhere": 0.9, "<i>odd</i>": 1.0}]
    (run / "verdicts.jsonl").write_text("".join(json.dumps(row | {"seconds": 0.1}) + "\n" for row in rows))
    (run / "verdict.json").write_text(json.dumps({"schema": 1, "left_out": ["No <b>class</b> here."]}))
    page = write_report(run).read_text(encoding="utf-8")
    assert "<code class=whole>prior.others.count=256</code>" in page
    page = page.replace("<code class=whole>", "").replace("</code>", "")
    assert "Base damaged" in page
    assert "the checkpoint of step 50 (it was not kept: train again with run.keep_best=true)" in page
    assert "prior.others.count=256 to keep everything else." in page
    assert "No &lt;b&gt;class&lt;/b&gt; here." in page
    assert "<i>odd" not in page
    assert page.count("<svg class=plot") == 2
    cells = [
        row.split("</td>") for row in page.split("<table class=measures>")[1].split("</table>")[0].split("<tr>")[1:]
    ]
    shown = {row[0].removeprefix("<td>"): (row[1], row[2]) for row in cells}
    assert shown["drift elsewhere"] == ("<td class=bad>0.90", f"<td class=soft>at most {LIMITS.elsewhere:g}")
    assert shown["learned, on the photos"] == ("<td>5.00", f"<td class=soft>at least {LIMITS.learned:g}")
    held = ["data.photos=photos", "data.class_noun=mug", "prior.others={}", "prior.caption_dropout=0"]
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe("dreambooth-lora", held)))
    (run / "checkpoints" / "step-000050").mkdir(parents=True)
    page = write_report(run).read_text(encoding="utf-8")
    assert "(it is kept: <code class=whole>finetune export RUN --step 50</code>)" in page
    assert "The run has a prior of everything else already." in page
    assert "prior.others" not in page.split("The verdict")[1].split("</p>")[0]


def test_a_damaged_verdicts_file_leaves_the_section_out(run: Path) -> None:
    (run / "verdicts.jsonl").write_bytes(b"\x00\xff\n{\n")
    assert "The verdict" not in write_report(run).read_text(encoding="utf-8")


def test_the_page_asks_to_look_at_the_class_where_a_prompt_shows_it(run: Path) -> None:
    assert "Check three things" in write_report(run).read_text(encoding="utf-8")
    info = json.loads((run / "run.json").read_text()) | {"prompts": ["a photo of zwx", "zwx on the beach"]}
    (run / "run.json").write_text(json.dumps(info))
    page = write_report(run).read_text(encoding="utf-8")
    assert "Check two things" in page
    assert "the class without the token" not in page
