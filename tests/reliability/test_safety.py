"""Safe by default: no pickle, no code of others, nothing outside the run folder, nothing told unasked."""

from __future__ import annotations

import ast
import base64
import html
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from data_tools.unpack import unpack
from finetune import load_recipe, train
from finetune.adapters.inspection import inspect_adapter
from finetune.adapters.operations import verify_file
from finetune.core.errors import BadInput
from finetune.core.files import public_name, replacing, save_tensors, sha256, write_json
from finetune.data.captions import caption_files
from finetune.data.decoding import BadImage, alpha_channel, open_image, open_values
from finetune.data.photos import read_photo, scan
from finetune.export.card import Card, model_card
from finetune.export.lora.diffusers import read_header
from finetune.export.model.model_folder import export_folder
from finetune.families.settings import Base
from finetune.families.source import load_family
from finetune.jobs.class_sets import ClassSet, check_set
from finetune.report.html import write_report
from finetune.report.pictures import copy_of, image_tag, keep_photos
from finetune.runs.folder import RunFolder
from finetune.runs.record import RunRecord
from finetune.sampling.images import parameters
from finetune.sampling.settings import Sampling
from finetune.training.checkpoint import Checkpoints, State, find_fault
from finetune.training.priors.class_images import ClassImages

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "data.class_noun=mug", "prior.others=null",
    "prior.count=2", "prior.steps=1", "sample.steps=1", "sample.count=1", "run.steps=2",
    "sample.prompts=['a photo of {token} {noun}']", "optim.lr=1e-2",
)  # fmt: skip
TEXT = {".json", ".jsonl", ".yaml", ".html", ".md", ".txt", ".lock", ".jinja"}


@pytest.fixture(scope="module")
def runs(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA and a full run below a folder with a telling name, from photos with telling captions."""
    home = tmp_path_factory.mktemp("jane-doe")
    base, photos = home / "models" / "mine", home / "pictures"
    shutil.copytree(tiny_bases["sd1"], base)
    photos.mkdir()
    for number in range(3):
        Image.effect_noise((48, 48), 90).convert("RGB").save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text("{token} mug in night city")
    made = {}
    for name, recipe in (("lora", "dreambooth-lora"), ("full", "dreambooth-full")):
        settings = [f"base={base}", f"data.photos={photos}", f"run.name={name}", *SETTINGS]
        made[name] = train(load_recipe(recipe, settings), home / "runs" / name)
    return made


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_nothing_that_is_written_is_a_pickle(kind: str, runs: dict[str, Path]) -> None:
    for file, content in contents(runs[kind]).items():
        assert file.suffix in TEXT | {".safetensors", ".png"}, file
        assert not content.startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")), file


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_passed_on_tells_no_folders_users_or_captions(kind: str, runs: dict[str, Path]) -> None:
    run = runs[kind]
    passed_on = contents(run / "exports") | contents(run / "samples") | {run / "report.html": b""}
    passed_on[run / "report.html"] = (run / "report.html").read_bytes()
    assert len(passed_on) > 4
    for file, content in passed_on.items():
        for secret in (b"jane-doe", b"in night city", str(Path.home()).encode() + b"/", str(ROOT).encode()):
            assert secret not in content, (file, secret)


def test_captions_are_shown_when_asked_for(runs: dict[str, Path]) -> None:
    page = runs["lora"] / "report.html"
    assert "report RUN --captions" in page.read_text()
    assert "in night city" in write_report(runs["lora"], with_captions=True).read_text()
    write_report(runs["lora"])


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/elsewhere", "a/b", "..", ".hidden", "a\\b", ""])
def test_a_name_leads_out_of_no_folder(name: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"run\.name"):
        load_recipe("dreambooth-lora", [f"data.photos={photos}", "data.class_noun=mug", f"run.name={name!r}"])


def test_an_adapters_metadata_leads_nowhere(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Names inside a file that somebody sent are never used as paths."""
    from finetune.cli.main import run

    part = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    width = json.loads((tiny_bases["sd1"] / "unet" / "config.json").read_text())["block_out_channels"][-1]
    tensors = {
        f"{part}.lora_down.weight": torch.ones(2, width),
        f"{part}.lora_up.weight": torch.ones(width, 2) * 1e-3,
        f"{part}.alpha": torch.tensor(2.0),
    }
    metadata = {"ss_output_name": "../../../evil", "modelspec.title": "/tmp/evil"}
    save_file(tensors, tmp_path / "sent.safetensors", metadata)
    out = tmp_path / "deep" / "er" / "out"
    arguments = ["sample", str(tmp_path / "sent.safetensors"), "-p", "../../../evil", "--base", str(tiny_bases["sd1"])]
    assert run([*arguments, "--steps", "1", "--count", "1", "--out", str(out)]) == (0, "")
    assert {file.parent for file in tmp_path.rglob("*.png")} == {out}


def test_a_bases_own_code_is_not_run(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """`auto_map` names a Python file beside the weights, for libraries that trust remote code."""
    base = tmp_path / "base"
    shutil.copytree(tiny_bases["sd1"], base)
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Evil: pass\n"
    for part in ("text_encoder", "unet"):
        (base / part / "evil.py").write_text(code)
        config = json.loads((base / part / "config.json").read_text())
        (base / part / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Evil"}}))
    load_family(str(base))
    assert not (tmp_path / "ran").exists()


GUARD = """
import sys
def hook(event, arguments):
    if event == "pickle.find_class" and not arguments[0].startswith(("multiprocessing", "torch._C")):
        print("PICKLE", arguments, flush=True)
sys.addaudithook(hook)
from finetune.cli.main import main
main()
"""


@pytest.mark.slow
def test_no_pickle_is_read_in_a_run_or_its_resumption(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Python's own audit event, raised for every class that a pickle names."""
    arguments = [f"base={tiny_bases['sd1']}", f"data.photos={photos}", f"run.dir={tmp_path / 'run'}", *SETTINGS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for more in ([], ["run.steps=3"]):
        command = [sys.executable, "-c", GUARD, "train", "dreambooth-lora", *arguments, *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert "PICKLE" not in done.stdout, done.stdout


def test_the_same_run_twice_is_the_same_bytes(runs: dict[str, Path], tmp_path: Path) -> None:
    again = train(RunFolder(runs["lora"]).recipe, tmp_path / "again")
    assert sha256(again / "adapter" / "trained.safetensors") == sha256(
        runs["lora"] / "adapter" / "trained.safetensors"
    )


# files that come from others: bases


@pytest.fixture
def base(tiny_bases: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the small SD1 base, to be spoilt."""
    return Path(shutil.copytree(tiny_bases["sd1"], tmp_path / "spoilt"))


def spoil(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("named", ["x.bin", "../../elsewhere/x.safetensors", "sub/x.safetensors", 7])
def test_an_index_names_only_safetensors_files_beside_it(part: str, named: object, base: Path) -> None:
    """transformers would read the pickle without --allow-pickle, or the file outside of the base."""
    (weights,) = (base / part).glob("*.safetensors")
    tensors = load_file(weights)
    target = base / part / str(named)
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, target) if target.suffix == ".bin" else save_file(tensors, target, {"format": "pt"})
    weights.rename(base / part / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, named)}
    (base / part / f"{weights.name}.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"index\.json names"):
        load_family(str(base))


def test_a_base_in_several_files_is_read(base: Path) -> None:
    (weights,) = (base / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    save_file(tensors, base / "unet" / "part-1.safetensors", {"format": "pt"})
    weights.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part-1.safetensors")}
    (base / "unet" / f"{weights.name}.index.json").write_text(json.dumps(index))
    assert torch.equal(load_family(str(base)).parts["denoiser"].conv_in.weight, tensors["conv_in.weight"])


@pytest.mark.parametrize(
    "name",
    ["KarrasVeScheduler", "UNet2DConditionModel", "DiffusionPipeline", "utils", "__file__", ["DDIMScheduler"], ""],
)
def test_a_scheduler_is_one_of_a_list(name: object, base: Path) -> None:
    spoil(base / "scheduler" / "scheduler_config.json", _class_name=name)
    with pytest.raises(BadInput, match=r"names the scheduler .*: change it to one of"):
        load_family(str(base))


LINKS = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="links need rights on Windows")


@LINKS
@pytest.mark.parametrize("whole", [False, True])
def test_a_bases_links_are_not_followed_into_exports(whole: bool, base: Path, tmp_path: Path) -> None:
    secret = tmp_path / "private" / "vocab.json"
    if whole:
        shutil.move(base / "tokenizer", secret.parent)
        (base / "tokenizer").symlink_to(secret.parent)
    else:
        secret.parent.mkdir()
        secret.write_text("{}")
        (base / "tokenizer" / "notes.json").symlink_to(secret)
    with pytest.raises(BadInput, match="leads out of"):
        load_family(str(base))


@LINKS
def test_a_snapshot_of_the_hub_is_links_and_is_read(base: Path, tmp_path: Path) -> None:
    """The hub's cache: models--x--y/snapshots/REVISION/FILE -> ../../blobs/HASH."""
    home = tmp_path / "models--x--y"
    (home / "blobs").mkdir(parents=True)
    for number, file in enumerate(file for file in base.rglob("*") if file.is_file()):
        link = home / "snapshots" / "abc" / file.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(file.rename(home / "blobs" / str(number)), link.parent))
    family = load_family(str(home / "snapshots" / "abc"))
    assert export_folder(family, tmp_path / "out", "fp32").ok
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_symlink()]


TOO_MUCH = {
    "unet/config.json": {"layers_per_block": 10**6},
    "vae/config.json": {"layers_per_block": 10**6},
    "text_encoder/config.json": {"num_hidden_layers": 10**7},
    "scheduler/scheduler_config.json": {"num_train_timesteps": 10**10},
    "unet/config.json ": {"sample_size": 10**7},
    "tokenizer/tokenizer_config.json": {"extra_ids": 10**9},
}


@pytest.mark.parametrize("file", TOO_MUCH)
def test_a_base_asks_for_no_boundless_work(file: str, base: Path) -> None:
    spoil(base / file.strip(), **TOO_MUCH[file])
    key = next(iter(TOO_MUCH[file]))
    with pytest.raises(BadInput, match=rf"{key}.* is .*more than"):
        load_family(str(base))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "quantization_config"])
def test_a_config_chooses_no_code(key: str, base: Path) -> None:
    """transformers takes a hub id here and runs the kernels that lie there."""
    spoil(base / "text_encoder" / "config.json", **{key: {"quant_method": "x"} if "quant" in key else "evil/kernel"})
    with pytest.raises(BadInput, match=key):
        load_family(str(base))


BROKEN = {
    "deep": "[" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "less deep": '{"a":' * 100 + "1" + "}" * 100,
    "a list": "[]",
    "a number": "7",
    "empty": "",
    "cut": '{"a": ',
    "twice": '{"schema": 1, "schema": 0}',
    "digits": '{"schema": ' + "9" * 6000 + "}",
    "NaN": '{"schema": NaN}',
    "infinite": '{"schema": 1e999}',
    "bytes": "\udcff\udcfe",
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize(
    "file",
    ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
     "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"],
)  # fmt: skip
def test_broken_json_in_a_base_is_named(file: str, fault: str, base: Path) -> None:
    (base / file).write_bytes(BROKEN[fault].encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInput, match=Path(file).name):
        load_family(str(base))


# files that come from others: run folders


@pytest.fixture
def received(tmp_path: Path) -> Path:
    """A finished run as somebody sends it: the page is made of it alone."""
    run = tmp_path / "received"
    for name in ("before", "after"):
        (run / "samples" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(run / "samples" / name / "00-0.png")
    info = {"schema": 1, "token": "zwx", "class_noun": "mug", "family": "sd1", "base": "tiny", "resolution": 64,
            "prompts": ["a mug"], "captions": [["a mug"]], "photos": []}  # fmt: skip
    (run / "run.json").write_text(json.dumps(info))
    item = {"format": "kohya", "path": "exports/x.safetensors", "size": 1, "read_by": ["x"], "checks": ["ok: x"]}
    (run / "exports.json").write_text(json.dumps([item]))
    rows = [{"step": n, "loss": 1 / n, "lr": 1e-4, "grad_norm": 1.0, "seconds": 0.5} for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


SCRIPT = "</title><script>alert(1)</script><img src=x onerror=alert(1)>'\"&"


def scripted(value: object) -> object:
    if isinstance(value, dict):
        return {f"{key}": scripted(item) for key, item in value.items()}
    return [scripted(item) for item in value] if isinstance(value, list) else SCRIPT


@pytest.mark.parametrize("file", ["run.json", "exports.json", "metrics.jsonl"])
def test_no_value_of_a_received_run_is_script_on_its_page(file: str, received: Path) -> None:
    """Each value in turn, numbers too: escaped, or refused by name."""
    lines = (received / file).read_text().splitlines() if file == "metrics.jsonl" else [(received / file).read_text()]
    whole = [json.loads(line) for line in lines]
    first = whole[0][0] if isinstance(whole[0], list) else whole[0]
    extra = {
        "plan": {"steps": "2"},
        "subjects": [{"token": "a", "class_noun": "b", "photos": 0}],
        "versions": {"x": "1"},
    }
    for key in [*first, *extra] if file == "run.json" else list(first):
        changed = first | {key: scripted((first | extra)[key])}
        if key == "plan":
            changed["plan"] = {SCRIPT: [SCRIPT, 7]}
        rows = [changed, *whole[1:]]
        (received / file).write_text(
            json.dumps([changed]) if file == "exports.json" else "\n".join(map(json.dumps, rows))
        )
        page, refused = page_or_refusal(received)
        assert page or str(received / file) in refused, key
        assert "<script" not in page
        assert "<img src=x" not in page


def page_or_refusal(run: Path) -> tuple[str, str]:
    try:
        return write_report(run).read_text(encoding="utf-8"), ""
    except BadInput as refused:
        return "", str(refused)


def test_the_page_forbids_what_it_does_not_need(received: Path) -> None:
    page = write_report(received).read_text(encoding="utf-8")
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert page.index("Content-Security-Policy") < page.index("<title>")


# before and after, and again with their difference
SEED_0 = ["seed 0", "seed 0", "before, seed 0", "after, seed 0", "difference, seed 0"]


def pictures_on(page: Path) -> list[str]:
    """What they are called, without the share of the difference."""
    found = re.findall(r'<img alt="([^"]*)"', page.read_text(encoding="utf-8"))
    return [re.sub(r": \d+%", "", alt) for alt in found]


def test_a_received_run_shows_no_image_of_this_disk(received: Path, tmp_path: Path) -> None:
    private = tmp_path / "private.png"
    Image.effect_noise((48, 48), 90).save(private)
    for path in (str(private), "../private.png", "samples/../../private.png"):
        spoil(received / "run.json", photos=[path])
        assert pictures_on(write_report(received)) == SEED_0


@LINKS
@pytest.mark.parametrize("place", ["samples/after/00-1.png", "samples/after", "photos", "samples", "run.json"])
def test_links_out_of_a_received_run_are_refused(place: str, received: Path, tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir()
    Image.effect_noise((48, 48), 90).save(private / "00-0.png")
    link = received / place
    moved = tmp_path / "moved"
    if link.is_dir():
        link.rename(moved)
    link.unlink(missing_ok=True)
    link.symlink_to(private if "." not in place else private / "00-0.png")
    with pytest.raises(BadInput, match="link"):
        write_report(received)


@LINKS
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "run.lock", "run.lock.txt", "status.json", "exports", "checkpoints"]
)
def test_a_run_writes_through_no_link_that_it_was_sent(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["lora"], run)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    remove(run / name)
    (run / name).symlink_to(victim)
    recipe = RunFolder(run).recipe
    with pytest.raises(BadInput, match="link"):
        train(recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 3})}), run)
    assert victim.read_text() == "mine"


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def foreign_picture(kind: str) -> bytes:
    """A picture that Pillow reads by more code than a page needs: EPS is given to Ghostscript."""
    if kind == "eps":
        return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    held = io.BytesIO()
    Image.new("RGB", (16, 16)).save(held, kind)
    return held.getvalue()


@pytest.mark.parametrize("kind", ["eps", "GIF", "TIFF", "BMP", "PPM", "ICO"])
def test_a_page_shows_png_jpeg_and_webp_alone(kind: str, received: Path) -> None:
    (received / "samples" / "after" / "00-1.png").write_bytes(foreign_picture(kind))
    page = write_report(received)
    assert pictures_on(page) == SEED_0
    assert "00-1.png" in page.read_text()  # it is said


def test_a_strip_is_not_enlarged_into_gigabytes(received: Path) -> None:
    Image.new("RGB", (60_000, 1)).save(received / "samples" / "after" / "00-1.png")
    assert pictures_on(write_report(received)) == SEED_0


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("name", ["run.json", "exports.json"])
def test_broken_json_in_a_run_is_named(name: str, fault: str, received: Path) -> None:
    if (name, fault) == ("exports.json", "a list"):
        return
    (received / name).write_bytes(BROKEN[fault].encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInput, match=name):
        write_report(received)


@pytest.mark.parametrize("path", ["../../x", "/etc/passwd", "exports/../../x", "exports", ".", ""])
def test_exports_json_leads_nowhere(path: str, received: Path) -> None:
    item = json.loads((received / "exports.json").read_text())[0] | {"path": path}
    (received / "exports.json").write_text(json.dumps([item]))
    with pytest.raises(BadInput, match=r"exports\.json"):
        write_report(received)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_state_is_a_damaged_checkpoint(fault: str, tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(State(1, {"a": torch.ones(2)}, {}), keep=2)
    (store.save(State(2, {"a": torch.ones(2)}, {}), keep=2) / "state.json").write_bytes(
        BROKEN[fault].encode("utf-8", "surrogateescape")
    )
    with pytest.warns(UserWarning, match="damaged"):
        found = store.latest()
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize(
    "change", [{"files": {"../../secret.safetensors": {"size": 1, "sha256": "x"}}}, {"files": []}, {"step": "2"},
               {"values": []}, {"step": -1}, {"files": {"trained.safetensors": 7}}, {"files": {}}]
)  # fmt: skip
def test_a_state_names_its_own_files(change: dict, tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path).save(State(2, {"a": torch.ones(2)}, {}), keep=2)
    spoil(folder / "state.json", **change)
    assert "state.json" in (find_fault(folder) or "")


# what is written


def test_relative_paths_tell_no_more_than_absolute_ones(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "work"
    shutil.copytree(runs["lora"].parents[1], home / "jane-doe", ignore=shutil.ignore_patterns("runs"))
    monkeypatch.chdir(home)
    settings = ["base=jane-doe/models/mine", "data.photos=jane-doe/pictures", "run.name=lora", *SETTINGS]
    run = train(load_recipe("dreambooth-lora", settings), Path("jane-doe/runs/lora"))
    sent = (
        contents(run / "exports")
        | contents(run / "samples")
        | {run / "report.html": (run / "report.html").read_bytes()}
    )
    for file, content in sent.items():
        assert b"jane-doe" not in content, file
    monkeypatch.chdir(tmp_path)  # where the relative base is not there
    assert "jane-doe" not in write_report(Path("work") / run).read_text()


@pytest.mark.parametrize(
    ("base", "told"),
    [("tiny", "tiny"), ("owner/name", "owner/name"), ("/home/jane/mine", "mine"), ("../jane/mine", "mine"),
     ("./jane/mine", "mine"), ("~/models/mine", "mine"), ("a/jane/mine", "mine"), ("C:\\Users\\jane\\mine", "mine"),
     ("..\\jane\\mine", "mine"), ("\\\\jane\\share\\mine", "mine"), ("/home/jane/mine/", "mine")],
)  # fmt: skip
def test_what_a_base_is_called_to_others(base: str, told: str) -> None:
    assert public_name(base) == told
    assert parameters("p", 0, Sampling("", "ddim", 1, 1.0, 64), base).endswith(f"Model: {told}")


def test_a_base_given_by_a_relative_path_is_that_folder_for_ever(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    assert Base(source="spoilt").source == str(base)
    assert Base(source="tiny").source == "tiny"
    assert Base(source="owner/name").source == "owner/name"


def test_photos_are_shown_from_the_runs_own_small_copies(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "elsewhere"
    shutil.copytree(runs["lora"], run)
    spoil(run / "run.json", photos=[f"/nowhere/{number}.png" for number in range(3)])
    assert pictures_on(write_report(run))[:3] == ["0.png", "1.png", "2.png"]


def modes(folder: Path) -> set[str]:
    return {oct(path.stat().st_mode & 0o777) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, "0o644"), (0o077, "0o600"), (0o002, "0o664")])
def test_files_have_the_rights_that_the_umask_says(umask: int, mode: str, base: Path, tmp_path: Path) -> None:
    for file in base.rglob("*.json"):
        file.chmod(0o600)  # a base's own rights are not taken over
    old = os.umask(umask)
    try:
        save_tensors(tmp_path / "out" / "a.safetensors", {"a": torch.ones(2)})
        write_json(tmp_path / "out" / "a.json", {})
        Checkpoints(tmp_path / "out").save(State(1, {"a": torch.ones(2)}, {}), keep=1)
        export_folder(load_family(str(base)), tmp_path / "out" / "model", "fp32")
    finally:
        os.umask(old)
    assert modes(tmp_path / "out") == {mode}


@LINKS
def test_a_temporary_file_can_not_be_laid_in_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a guess is right all the same, the link is refused and not written through."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".a.json.{os.getpid()}.tmp").symlink_to(victim)
    write_json(tmp_path / "a.json", {})
    with replacing(tmp_path / "b") as first, replacing(tmp_path / "b") as second:
        assert first != second
        first.touch()
        second.touch()
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 16)
    (tmp_path / f".a.json.{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "a.json", {})
    assert victim.read_text() == "mine"


def test_what_a_killed_process_left_is_swept(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["lora"], run)
    left = [run / ".report.html.123.tmp", run / "adapter" / f".trained.safetensors.{'a' * 16}.tmp",
            run / "samples" / ".after.tmp" / "00-0.png"]  # fmt: skip
    for file in left:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    (run / "notes.tmp").touch()
    with RunFolder(run).held(RunFolder(run).recipe):
        assert not [file for file in left if file.exists()]
    assert (run / "notes.tmp").exists()  # a person's


# images


def bomb(file: Path, size: tuple[int, int], mode: str = "1") -> Path:
    Image.new(mode, size).save(file)
    return file


def test_a_small_file_of_a_huge_picture_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = bomb(tmp_path / "bomb.png", (13_000, 13_000))
    assert file.stat().st_size < 30_000
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    for use in (read_photo, open_image, alpha_channel, open_values):
        with pytest.raises(BadImage, match="676 MB"):
            use(file)


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "long.png"
    with file.open("wb") as opened:
        opened.truncate(600_000_000)  # sparse
    with pytest.raises(BadImage, match="600 MB"):
        read_photo(file)


@LINKS
@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_a_photo_is_a_plain_file(target: str, tmp_path: Path) -> None:
    if target == "pipe":
        os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.png").symlink_to(target)
    with pytest.raises(BadInput, match="not a regular file"):
        scan(tmp_path)


@pytest.mark.parametrize("kind", ["eps", "PPM", "ICO", "PCX"])
def test_a_photo_has_one_of_the_formats_that_are_read(kind: str, tmp_path: Path) -> None:
    """By its content: the name says .png."""
    (tmp_path / "a.png").write_bytes(foreign_picture(kind))
    with pytest.raises(BadImage, match="not an image"):
        read_photo(tmp_path / "a.png")


# recipes and prompts


YAML = {
    "deep": "base: " + "[" * 1000,
    "less deep": "base: " + "[" * 100 + "]" * 100,
    "digits": "run: {seed: " + "9" * 6000 + "}",
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{n}: &{n} [{','.join([f'*{chr(ord(n) - 1)}'] * 10)}]\n" for n in "bcdefghij"),
    "itself": "base: &a [*a]",
    "month": "run: {seed: 2024-13-45}",
    "code": "base: !!python/object/apply:os.system ['true']",
}


@pytest.mark.parametrize("fault", YAML)
def test_a_recipe_is_plain_and_of_a_recipes_size(fault: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(YAML[fault])
    with pytest.raises(BadInput, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("value", ["[" * 1000, "9" * 6000, "2024-13-45"])
def test_a_setting_is_plain_too(value: str) -> None:
    with pytest.raises(BadInput, match=r"run\.seed"):
        load_recipe("demo", [f"run.seed={value}"])


def test_a_prompt_has_a_length(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    with pytest.raises(BadInput, match=r"1,000,000 characters"):
        family.tokenize(0, ["a" * 1_000_000])
    with pytest.raises(BadInput, match=r"class_noun"):
        load_recipe("demo", [f"data.class_noun={'a' * 1_000_000}"])
    with pytest.raises(BadInput, match=r"token"):
        load_recipe("demo", [f"data.token={'a' * 1_000_000}"])


# what was tried beyond the list


def lora_for(base: Path, rank: int = 2, **changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """A LoRA of one module in kohya's names; `changed`: down, up or alpha."""
    part = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    width = json.loads((base / "unet" / "config.json").read_text())["block_out_channels"][-1]
    held = {
        "down": torch.ones(rank, width),
        "up": torch.ones(width, rank) * 1e-3,
        "alpha": torch.tensor(2.0),
    } | changed
    return {f"{part}.{'alpha' if k == 'alpha' else f'lora_{k}.weight'}": v for k, v in held.items()}


@pytest.mark.parametrize(
    "change",
    [{"down": torch.ones(0, 8), "up": torch.ones(8, 0)}, {"down": torch.tensor(1.0)}, {"up": torch.tensor(1.0)},
     {"alpha": torch.ones(3)}, {"alpha": torch.ones(0)}, {"down": torch.ones(2, 0)}, {"up": torch.ones(2)}],
)  # fmt: skip
def test_an_adapter_of_odd_shapes_is_named(change: dict[str, torch.Tensor], base: Path, tmp_path: Path) -> None:
    file = tmp_path / "odd.safetensors"
    save_file(lora_for(base, **change), file)
    assert "another-shape" in inspect_adapter(file, str(base)).faults


HEADERS = {
    "a pattern that takes for ever": {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": "(((a|_|.)+)+)+$"},
    "one in a list": {"unet.r": 2, "unet.target_modules": ["((\\w+)+)+$"]},
    "one in a rank": {"unet.r": 2, "unet.rank_pattern": {"((\\w+)+)+$": 4}},
    "another start": {"unet.r": 2, "unet.init_lora_weights": "pissa"},
    "a module to import": {"unet.r": 2, "unet.megatron_core": "evil", "unet.megatron_config": {"x": 1}},
    "deep": {"unet.r": json.loads("[" * 200 + "]" * 200)},
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_header_gives_peft_no_patterns_and_no_code(fault: str, base: Path, tmp_path: Path) -> None:
    """diffusers hands `lora_adapter_metadata` to peft.LoraConfig as it is."""
    file = tmp_path / "sent.safetensors"
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up, _ = lora_for(base).values()
    tensors = {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(HEADERS[fault])})
    with pytest.raises(BadInput, match=r"sent\.safetensors"):
        verify_file(file, str(base))


def test_a_header_as_diffusers_writes_it_is_read(base: Path, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights="gaussian").to_dict()
    config = {f"unet.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    header = {"lora_adapter_metadata": json.dumps(config, default=str)}
    assert read_header(tmp_path, header)["unet.lora_alpha"] == 4


@pytest.mark.slow
def test_a_terminal_is_told_no_commands(base: Path, tmp_path: Path) -> None:
    save_file({f"{key}\x1b[2J": value for key, value in lora_for(base).items()}, tmp_path / "a.safetensors")
    save_file({"\x1b]0;mine\x07.lora_down.weight": torch.ones(2, 2)}, tmp_path / "b.safetensors")
    save_file(lora_for(base), tmp_path / "c.safetensors", {"modelspec.title": "\x1b[2Jfine\nok: all is well"})
    (base / "README.md").write_text('---\nlicense: "mit\\e[2J"\n---\n')
    (base / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "\\u001b[2J"}')
    for arguments in (["verify", "a"], ["verify", "b"], ["verify", "c"], ["inspect", None]):
        files = [str(tmp_path / f"{arguments[1]}.safetensors"), "--base", "tiny"] if arguments[1] else [str(base)]
        command = [sys.executable, "-m", "finetune", arguments[0], *files]
        done = subprocess.run(command, capture_output=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert b"\x1b" not in done.stdout + done.stderr
        assert b"Traceback" not in done.stderr
        assert b"\nok: all" not in done.stdout


def test_a_photos_own_words_do_not_leave_with_its_small_copy(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "jane-doe"
    photo = tmp_path / "photo.jpg"
    Image.effect_noise((48, 48), 90).convert("RGB").save(
        photo, comment=b"jane-doe at home", exif=exif, icc_profile=b"jane-doe"
    )
    keep_photos(tmp_path / "run", RunRecord(photos=[str(photo)]))
    copy = copy_of(tmp_path / "run", 0)
    assert b"jane-doe" in photo.read_bytes()
    assert b"jane-doe" not in copy.read_bytes()
    tag = image_tag(open_image(photo), "x")
    assert b"jane-doe" not in base64.b64decode(tag.split("base64,")[1].split('"')[0])


def test_a_prompt_on_the_model_card_is_no_code() -> None:
    evil = '"); import os; os.system("true") #\n```\n'
    card = Card("x", evil, "sd1", evil, None, ["adapter"], {}, [(evil, "images/00.png")], [])
    code = model_card(card).split("```python\n")[1].split("\n```")[0]
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert not [call for call in calls if "os" in call.split(".")]


def test_a_data_set_takes_no_picture_from_this_disk(tmp_path: Path) -> None:
    import datasets

    private = tmp_path / "private.png"
    Image.new("RGB", (48, 48)).save(private)
    rows = datasets.Dataset.from_list([{"image": {"bytes": None, "path": str(private)}}])
    (tmp_path / "sent").mkdir()
    rows.to_parquet(str(tmp_path / "sent" / "set.parquet"))
    with pytest.raises(BadInput, match="not inside its folder"):
        unpack(str(tmp_path / "sent" / "set.parquet"), tmp_path / "out", "train", "image", "text", None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("metadata.jsonl", "[" * 200_000), ("metadata.jsonl", '{"file_name": "0.png", "text": "a", "text": "b"}'),
     ("captions.csv", f"0.png,{'a' * 200_000}"), ("0.txt", "\x00" * 2 + "a" * 70_000_000)],
)  # fmt: skip
def test_odd_captions_are_named(name: str, text: str, photos: Path) -> None:
    (photos / name).write_text(text)
    with pytest.raises(BadInput, match=re.escape(name)):
        caption_files(photos, scan(photos))


@pytest.mark.parametrize(
    "row",
    [
        {"loss": 1e308},
        {"loss": -1.05},
        {"loss": "1"},
        {"step": True},
        {"lr": None},
        {"seconds": [1]},
        {"loss": 10**30},
    ],
)
def test_odd_metrics_draw_no_curve_and_stop_no_page(row: dict, received: Path) -> None:
    first = {"step": 1, "loss": -1.0, "lr": 0, "seconds": 0.1}
    lines = [
        json.dumps(first),
        json.dumps(first | {"step": 2} | row),
        "NaN",
        "[" * 100_000,
        '{"step": 3, "loss": NaN}',
    ]
    (received / "metrics.jsonl").write_text("\n".join(lines))
    page = write_report(received).read_text(encoding="utf-8")
    assert "nan" not in re.findall(r'points="([^"]*)"', page)
    assert "inf" not in "".join(re.findall(r'points="([^"]*)"', page))


@pytest.mark.parametrize("content", [b"", b"junk", b"\x89PNG\r\n\x1a\n" + bytes(50)], ids=["empty", "text", "cut"])
def test_a_broken_image_is_named_on_the_page_and_stops_nothing(content: bytes, received: Path) -> None:
    (received / "samples" / "after" / "00-0.png").write_bytes(content)
    page = write_report(received).read_text(encoding="utf-8")
    assert "00-0.png can't be shown (" in page
    assert page.count("<img") == 1


def test_class_images_of_others_name_their_own_files(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"pictures": {"../../x.png": {"sha256": "0"}}}))
    with pytest.raises(BadInput, match=r"manifest\.json"):
        check_set(ClassSet(ClassImages(folder=tmp_path), "dog", 32, "hash"))


def test_a_tokenizer_of_another_base_is_named(base: Path) -> None:
    (base / "tokenizer" / "tokenizer.json").unlink()  # which has a list of its own
    vocabulary = json.loads((base / "tokenizer" / "vocab.json").read_text())
    (base / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary | {"zz</w>": 10**6}))
    with pytest.raises(BadInput, match="tokenizer"):
        load_family(str(base))


READERS = {
    "json.load": (),
    "json.loads": ("core/reading.py", "core/files.py", "testing/random_base.py"),
    "Image.open": ("data/decoding.py",), "yaml.load": ("core/reading.py",), "yaml.safe_load": (),
    "torch.load": ("evaluation/backbones/base.py",), "pickle.load": (), "pickle.loads": (), "shutil.copy": (),
    "shutil.copytree": (),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_there_is_one_reader_of_each_kind_of_file(name: str) -> None:
    """`core/files.py` sorts the header that safetensors has just written; `testing` reads what it wrote. Networks that
    are published as pickles only are read with `weights_only`, and with --allow-pickle (tests/evaluation)."""
    calls = {
        (file, ast.unparse(node.func))
        for package in (ROOT / "finetune", ROOT / "data_tools")
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }
    assert {file for file, called in calls if called == name} == {ROOT / "finetune" / file for file in READERS[name]}


PEFT = {
    "no rank": ({"r": None}, {}), "rank 0": ({"r": 0}, {}), "another rank": ({"r": 3}, {}),
    "no alpha": ({"lora_alpha": None}, {}), "no B": ({}, {"B": None}), "a number": ({}, {"A": torch.tensor(1.0)}),
    "nothing": ({}, {"A": None, "B": None}), "another tensor": ({}, {"C": torch.ones(1)}),
}  # fmt: skip


@pytest.mark.parametrize("fault", PEFT)
def test_a_broken_folder_of_peft_is_named(fault: str, base: Path, tmp_path: Path) -> None:
    config, change = PEFT[fault]
    down, up, _ = lora_for(base).values()
    folder = tmp_path / "sent" / "denoiser"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config))
    path = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    held = {"A": down, "B": up} | change
    tensors = {f"{path}.lora_{name}.weight": value for name, value in held.items() if value is not None}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="not a complete PEFT LoRA"):
        inspect_adapter(tmp_path / "sent", str(base))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_named(alpha: float, base: Path, tmp_path: Path) -> None:
    save_file(lora_for(base, alpha=torch.tensor(alpha)), tmp_path / "odd.safetensors")
    assert "not-finite" in inspect_adapter(tmp_path / "odd.safetensors", str(base)).faults


def test_a_command_on_the_page_is_words_for_a_shell(received: Path) -> None:
    """They are there to be pasted."""
    evil = "x\"; touch mine; $(touch mine) `touch mine` '; touch mine #"
    spoil(received / "run.json", token=evil)
    run = received.rename(received.with_name("a; touch mine; #"))
    shown = re.findall(r"<pre[^>]*>(.*?)</pre>", write_report(run).read_text(), re.DOTALL)
    commands = html.unescape(shown[0]).splitlines()
    words = [shlex.split(line, comments=True) for line in commands]
    assert [line[:2] for line in words if line] == [["finetune", name] for name in ("sample", "export", "train")]
    assert words[1][4] == f"a photo of {evil} mug in the city"
    assert words[1][2] == words[3][2] == run.name
    done = subprocess.run(
        ["sh", "-c", f"finetune() {{ :; }}\n{commands[1]}\n{commands[3]}"], cwd=run.parent, check=True
    )
    assert done.returncode == 0
    assert not (run.parent / "mine").exists()
    item = json.loads((run / "exports.json").read_text())[0] | {"format": "kohya; touch mine"}
    (run / "exports.json").write_text(json.dumps([item]))
    with pytest.raises(BadInput, match="format"):
        write_report(run)
