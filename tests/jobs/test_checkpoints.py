"""What a stopped or running run's checkpoints give: what the run would have given had it ended there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from ends import metrics, weights
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.cli.main import run as command
from finetune.config.load import parse_recipe
from finetune.config.recipe import Recipe
from finetune.core.errors import BadInput
from finetune.families.source import load_family
from finetune.jobs import train as job
from finetune.jobs.export import ExportPlace, export_result, export_run
from finetune.jobs.open import base_to_draw, open_result, open_run
from finetune.jobs.plan import plan
from finetune.jobs.prepare import prepare
from finetune.runs.folder import RunFolder
from finetune.runs.plan import plan_rows
from finetune.sampling.draw import draw
from finetune.sampling.settings import Sampling
from finetune.testing.kill import killed_at

LOOK = {"count": 1, "steps": 1, "prompts": ["a photo of {token} {noun}"]}
LORA = {"kind": "lora", "rank": 2}
SCHEDULE_FREE = {"kind": "schedule_free", "lr": 1e-2}


def recipe_of(base: Path, photos: Path, steps: int, **sections: dict) -> Recipe:
    kept = {"steps": steps, "checkpoint_every": 1, "keep": 10, "name": "mug"}
    return parse_recipe(
        {
            "base": str(base),
            "data": {"photos": str(photos), "class_noun": "mug"},
            "prior": {"kind": "none"},
            "method": LORA,
            "optim": {"kind": "adamw", "lr": 1e-2},
            "sample": LOOK,
        }
        | sections
        | {"run": kept | sections.get("run", {})}
    )


@pytest.fixture
def stopped(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> Path:
    """A run of four steps, killed in the fourth."""
    with killed_at(3):
        job.train(recipe_of(tiny_bases["sd1"], photos, 4), tmp_path / "run")
    return tmp_path / "run"


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


@pytest.mark.parametrize(
    "sections",
    [{}, {"run": {"ema": 0.9}}, {"optim": SCHEDULE_FREE}, {"method": {"kind": "full"}}],
    ids=["raw", "ema", "schedule-free", "full"],
)
def test_a_checkpoint_is_the_run_that_ends_there(
    sections: dict, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """The weights of step 2 of 4 are the result of a run of 2 steps, bit for bit."""
    short = job.train(recipe_of(tiny_bases["sd1"], photos, 2, **sections), tmp_path / "short")
    with killed_at(3):
        job.train(recipe_of(tiny_bases["sd1"], photos, 4, **sections), tmp_path / "long")
    folder = RunFolder(tmp_path / "long")
    family, info = open_run(folder, step=2)
    wanted, found = load_file(short / "adapter" / "trained.safetensors"), folder.recipe.method.state_dict(family)
    assert info.token
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_the_newest_checkpoint_is_what_a_stopped_run_gives(stopped: Path) -> None:
    folder = RunFolder(stopped)
    method = folder.recipe.method
    newest = folder.checkpoints.steps()[-1]
    assert newest < 4
    states = [method.state_dict(open_run(folder, step=step)[0]) for step in (None, newest, 1)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_a_step_that_is_not_kept_is_refused_and_the_kept_are_named(stopped: Path) -> None:
    folder = RunFolder(stopped)
    kept = folder.checkpoints.steps()
    with pytest.raises(BadInput, match=f"step 99 .* not kept; kept are: {', '.join(map(str, kept))}"):
        open_run(folder, step=99)
    (stopped / "checkpoints" / "step-000001" / "trained.safetensors").write_bytes(b"x")
    with pytest.raises(BadInput, match=f"step 1 .* damaged; kept are: {', '.join(map(str, kept[1:]))}"):
        open_run(folder, step=1)
    shutil.rmtree(stopped / "checkpoints")
    with pytest.raises(BadInput, match="no checkpoint yet"):
        open_run(folder)


def test_an_export_of_a_checkpoint_says_its_step(stopped: Path, tiny_bases: dict[str, Path]) -> None:
    code, said = command(["export", str(stopped), "--step", "2", "--to", "kohya"])
    assert code == 0, said
    file = stopped / "exports" / "step-000002" / "mug-step-000002.safetensors"
    with safe_open(file, "pt") as held:
        about = held.metadata()
    assert about["finetune_steps"] == "2"
    assert about["modelspec.title"] == about["ss_output_name"] == "mug-step-000002"
    assert not (stopped / "exports.json").exists()
    drawn = [
        draw(open_result(source, str(tiny_bases["sd1"]), step=step)[0], ["a mug"], Sampling(steps=2), seeds=[1])[0]
        for source, step in ((file, None), (stopped, 2))
    ]
    assert max(abs(a - b) for a, b in zip(*(image.tobytes() for image in drawn), strict=True)) <= 1


def test_a_run_at_work_is_only_read(stopped: Path, tmp_path: Path) -> None:
    folder = RunFolder(stopped)
    with folder.held(folder.recipe):
        assert folder.at_work()
        before = tree(stopped)
        for refused in (["export", str(stopped)], ["report", str(stopped)], ["report", str(stopped), "--step", "2"]):
            code, said = command(refused)
            assert (code, "--out" in said, "at work" in said) == (2, True, True), said
        assert (
            command(["export", str(stopped), "--step", "2", "--to", "kohya", "--out", str(tmp_path / "out")])[0] == 0
        )
        pictures = ["-p", "a mug", "--steps", "1", "--count", "1", "--out", str(tmp_path / "pictures")]
        assert command(["sample", str(stopped), *pictures])[0] == 0
        page = tmp_path / "page.html"
        assert command(["report", str(stopped), "--step", "2", "--out", str(page)])[0] == 0
        assert tree(stopped) == before
    assert not folder.at_work()
    assert (tmp_path / "out" / "mug-step-000002.safetensors").is_file()
    assert (tmp_path / "pictures" / "grid.png").is_file()
    assert "step 2 of 4" in page.read_text(encoding="utf-8")


def test_a_page_of_a_stopped_run_says_where_it_stands(stopped: Path) -> None:
    newest = RunFolder(stopped).checkpoints.steps()[-1]
    assert command(["report", str(stopped)])[0] == 0
    assert f"step {newest} of 4" in (stopped / "report.html").read_text(encoding="utf-8")
    assert command(["report", str(stopped), "--step", "1"])[0] == 0
    assert "step 1 of 4" in (stopped / "report-step-000001.html").read_text(encoding="utf-8")
    assert command(["report", str(stopped), "--step", "9"])[0] == 2


@pytest.mark.slow
def test_the_last_step_of_a_finished_run_is_its_result(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    run = RunFolder(job.train(recipe_of(tiny_bases["sd1"], photos, 2), tmp_path / "run"))
    shutil.rmtree(run.path / "checkpoints" / "step-000002")
    family, _ = open_run(run, step=2)
    exported = export_run(run, family, ["kohya"], place=ExportPlace(run, run.step_to_open(2)))
    assert exported[0].path == run.path / "exports" / "mug.safetensors"
    before = (run.path / "exports.json").read_bytes()
    assert command(["export", str(run.path), "--step", "1", "--to", "kohya"])[0] == 0
    assert (run.path / "exports.json").read_bytes() == before


def test_the_weight_of_a_lora(stopped: Path, tiny_bases: dict[str, Path]) -> None:
    """At 0 the base; twice the weights of B at 2; the file at .5 draws what the run does."""
    look = Sampling(steps=2, size=32)
    base = draw(load_family(str(tiny_bases["sd1"])), ["a mug"], look, seeds=[1])[0]
    none = draw(open_result(stopped, weight=0.0)[0], ["a mug"], look, seeds=[1])[0]
    assert none.tobytes() == base.tobytes()
    method = RunFolder(stopped).recipe.method
    once, twice = (method.state_dict(open_result(stopped, weight=weight)[0]) for weight in (1.0, 2.0))
    assert all(torch.equal(value * (2 if "lora_B" in name else 1), twice[name]) for name, value in once.items())
    assert command(["export", str(stopped), "--to", "kohya"])[0] == 0
    file = next((stopped / "exports").rglob("*.safetensors"))
    half = [
        draw(open_result(source, str(tiny_bases["sd1"]), weight=0.5)[0], ["a mug"], look, seeds=[1])[0]
        for source in (file, stopped)
    ]
    assert max(abs(a - b) for a, b in zip(*(image.tobytes() for image in half), strict=True)) <= 1
    with pytest.raises(BadInput, match="nan"):
        open_result(stopped, weight=float("nan"))


def sampled(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The exit code, the error and what was printed."""
    capfd.readouterr()
    code, said = command(["sample", *map(str, arguments)])
    return code, said, capfd.readouterr().out


def test_images_are_numbered_on_and_none_is_overwritten(
    stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "drawn"
    look = ("-p", "a mug", "--steps", "1", "--count", "2", "--out", out)
    assert sampled(capfd, stopped, *look)[0] == 0
    first = tree(out)
    assert sorted(first) == ["00-0.png", "00-1.png", "grid.png"]
    code, _, printed = sampled(capfd, stopped, *look, "-p", "a dog", "--step", "1", "--size", "64")
    assert code == 0
    assert "4 images and grid-2.png" in printed
    second = tree(out)
    assert {name: second[name] for name in first} == first
    new = {"01-0.png", "01-1.png", "02-0.png", "02-1.png", "grid-2.png"}
    assert second.keys() - first.keys() == new
    with Image.open(out / "02-1.png") as image:
        assert image.size == (64, 64)
        assert image.text["parameters"].startswith("a dog\n")
        assert "Seed: 1, Size: 64x64" in image.text["parameters"]


def test_a_cut_prompt_is_named(stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompt = f"{'very ' * 100}tall mug"
    code, _, printed = sampled(capfd, stopped, "-p", prompt, "--steps", "1", "--count", "1", "--out", tmp_path / "o")
    assert code == 0
    notes = [line for line in printed.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "tall mug' is ignored" in notes[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--base", "tiny"), ("--base tiny", "its own base")),
        (("--guidance", "nan"), ("--guidance is nan",)),
        (("--steps", "5000"), ("--steps is 5,000", "1,000")),
        (("--size", "33"), ("--size is 33", "32")),
        (("--weight", "nan"), ("weight is nan",)),
        (("--step", "0"), ("step 0", "not kept", "1, 2")),
    ],
)
def test_sample_refuses_in_one_sentence(
    options: tuple[str, ...], words: tuple[str, ...], stopped: Path, tmp_path: Path
) -> None:
    code, said = command(["sample", str(stopped), "-p", "a mug", "--out", str(tmp_path / "o"), *options])
    assert code == 2
    assert all(word in said for word in words), said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_a_step_beside_a_file_and_a_weight_beside_no_lora_are_refused(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"--step 2 .* is no run folder"):
        open_result(tmp_path / "a.safetensors", step=2)
    recipe = recipe_of(tiny_bases["sd1"], photos, 3, method={"kind": "full"}, export={"verify": "off"})
    with killed_at(2):
        job.train(recipe, tmp_path / "run")
    with pytest.raises(BadInput, match=r"weight of 0\.5 is for a LoRA .* full"):
        open_result(tmp_path / "run", weight=0.5)


COSINE = {"kind": "adamw", "lr": 1e-2, "schedule": "cosine"}


@pytest.mark.slow
def test_a_longer_run_keeps_the_curve_of_its_learning_rate_or_is_refused(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """As planned from the start with a span of 4; without the span the rate would rise again after step 2."""

    def cosine(steps: int, **more: int) -> Recipe:
        return recipe_of(
            tiny_bases["sd1"], photos, steps, optim=COSINE | more, export={"verify": "off", "formats": ["kohya"]}
        )

    run = job.train(cosine(2), tmp_path / "run")
    with pytest.raises(BadInput, match=r"optim\.schedule_steps=2 .* or choose another folder"):
        job.train(cosine(4), run)
    with pytest.raises(BadInput, match="schedule_steps"):
        job.train(cosine(4, schedule_steps=4), run)
    ended = weights(run)
    job.train(cosine(4, schedule_steps=2), run)
    assert [row["lr"] for row in metrics(run)] == pytest.approx([0.01, 0.005, 0, 0])
    assert all(torch.equal(value, ended[name]) for name, value in weights(run).items())

    planned = job.train(cosine(2, schedule_steps=4), tmp_path / "planned")
    job.train(cosine(4, schedule_steps=4), planned)
    whole = job.train(cosine(4), tmp_path / "whole")
    assert metrics(planned) == metrics(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(planned).items())


def test_photos_that_are_never_seen_are_told(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    for shape in ("square", "buckets"):
        data = {"photos": str(photos), "class_noun": "mug", "shape": shape}
        for steps, words in (
            (2, "NOT all are seen: 2 steps of 1 are 67% of an epoch; set run.steps to at least 3"),
            (3, "seen 1 times"),
        ):
            job_plan = plan(prepare(recipe_of(tiny_bases["sd1"], photos, steps, data=data)))
            assert plan_rows(job_plan)["each photo"] == words


def test_overrides_of_an_export_count_or_are_refused(stopped: Path, tmp_path: Path) -> None:
    """Also that of the metadata: what must not leave the house is not in the file."""
    headers = {}
    for metadata in ("standard", "minimal"):
        chosen = ["export.verify=off", f"export.metadata={metadata}"]
        (item,) = export_result(stopped, ["kohya"], out=tmp_path / metadata, overrides=chosen)
        with safe_open(item.path, "pt") as opened:
            headers[metadata] = opened.metadata()
    assert headers["standard"]["finetune_seed"] == "0"
    assert headers["standard"]["modelspec.trigger_phrase"]
    assert not [key for key in headers["minimal"] if key.startswith("finetune_") or key.endswith("trigger_phrase")]
    with pytest.raises(BadInput, match=r"give those of export\.\*"):
        export_result(stopped, ["kohya"], out=tmp_path / "other", overrides=["method.rank=1"])


def test_a_file_without_a_base_is_drawn_on_tiny_only_if_it_is_for_tiny(photos: Path, tmp_path: Path) -> None:
    """Otherwise one sentence says what the file tells and asks for a base; nothing is drawn."""
    name = "lora_unet_middle_block_1_proj_in"
    other = {f"{name}.lora_down.weight": torch.ones(2, 1280), f"{name}.lora_up.weight": torch.ones(1280, 2)}
    file = tmp_path / "other.safetensors"
    save_file(other | {f"{name}.alpha": torch.tensor(2.0)}, file, {"ss_base_model_version": "sdxl_base_v1-0"})
    code, said = command(["sample", str(file), "-p", "a mug", "--out", str(tmp_path / "o")])
    assert code == 2
    assert all(word in said for word in ("is not for tiny", "SDXL", "--base BASE")), said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "o").exists()
    recipe = recipe_of(Path("tiny"), photos, 1, sample=LOOK | {"count": 1}, export={"verify": "off"})
    job.train(recipe, tmp_path / "run")
    ours = next((tmp_path / "run" / "exports").glob("*.safetensors"))
    assert base_to_draw(ours, None) == "tiny"
    assert base_to_draw(ours, "elsewhere") == "elsewhere"
