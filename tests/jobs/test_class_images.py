"""Class-image sets: the same files however they came to be, and refused when they are of something else."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.core.files import sha256
from finetune.core.processes import ALONE, Processes
from finetune.data.photos import scan
from finetune.families.source import load_family
from finetune.jobs import class_sets
from finetune.jobs.class_sets import ClassSet, check_set, class_images, seed_of
from finetune.jobs.prepare import Prepared, other_set, prepare
from finetune.jobs.prepare import class_sets as made_sets
from finetune.jobs.verdicts import _drawn_by
from finetune.training.priors.class_images import ClassImages

SMALL = ClassImages(count=5, batch_size=2, steps=2, guidance=2.0)


def make(base: Path, folder: Path, prior: ClassImages = SMALL, processes: Processes = ALONE) -> list[str]:
    family = load_family(str(base))
    wanted = ClassSet(prior.model_copy(update={"folder": folder}), "mug", 32, "basehash")
    photos = class_images(family, wanted, processes)
    return [sha256(photo.path) for photo in photos]


def test_a_set_and_its_manifest(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    hashes = make(tiny_bases["sd1"], tmp_path / "set")
    made = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert len(set(hashes)) == 5
    assert [made["pictures"][f"{k:05d}.png"]["sha256"] for k in range(5)] == hashes
    assert made["pictures"]["00003.png"]["seed"] == seed_of(3)
    assert (made["prompt"], made["sampler"], made["steps"]) == ("a photo of a mug", "dpm++", 2)


def test_an_interrupted_set_continues_to_the_same_files(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    whole = make(tiny_bases["sd1"], tmp_path / "whole")
    make(tiny_bases["sd1"], tmp_path / "cut")
    for name in ("00001.png", "00004.png"):
        (tmp_path / "cut" / name).unlink()
    kept = (tmp_path / "cut" / "00002.png").stat().st_mtime_ns
    assert make(tiny_bases["sd1"], tmp_path / "cut") == whole
    assert (tmp_path / "cut" / "00002.png").stat().st_mtime_ns == kept


@pytest.mark.parametrize("begun", range(3))
def test_what_another_run_draws_meanwhile_is_not_drawn_again(
    begun: int, tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run finishes the set while this one draws its first chunk, wherever it begins."""
    whole, drawn = make(tiny_bases["sd1"], tmp_path / "whole"), []
    real = class_sets.draw

    def one(*given: Any, **more: Any) -> Any:
        drawn.append(given)
        for file in (tmp_path / "whole").glob("*.png"):
            shutil.copy(file, tmp_path / "set")
        return real(*given, **more)

    monkeypatch.setattr(class_sets, "draw", one)
    monkeypatch.setattr(class_sets.os, "getpid", lambda: begun)
    assert make(tiny_bases["sd1"], tmp_path / "set") == whole
    assert len(drawn) == 1


@pytest.mark.parametrize("late", [0, 1])
def test_two_ranks_at_once_draw_the_same_files(tiny_bases: dict[str, Path], tmp_path: Path, late: int) -> None:
    """Two threads with a barrier, one of them slow to start, as processes are."""
    whole = make(tiny_bases["sd1"], tmp_path / "whole")
    prior = SMALL.model_copy(update={"folder": tmp_path / "two"})
    bases = [load_family(str(tiny_bases["sd1"])) for _ in range(2)]
    barrier = threading.Barrier(2, timeout=60)

    def rank(number: int) -> list[str]:
        if number == late:
            time.sleep(0.2)
        processes = Processes(number, 2, lambda: barrier.wait() and None)
        photos = class_images(bases[number], ClassSet(prior, "mug", 32, "basehash"), processes)
        return [photo.digest for photo in photos]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(rank, range(2))) == [whole, whole]


def test_a_rank_draws_its_own_chunks_whatever_is_there(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Chunk c is rank c % world's, so a rank that looks later than the others leaves nothing undrawn."""
    make(tiny_bases["sd1"], tmp_path / "set")
    for name in ("00002.png", "00004.png"):  # chunks 1 and 2 of (0 1) (2 3) (4)
        (tmp_path / "set" / name).unlink()
    with pytest.raises(FileNotFoundError):
        make(tiny_bases["sd1"], tmp_path / "set", processes=Processes(rank=1, world=2))
    assert (tmp_path / "set" / "00002.png").is_file()
    assert not (tmp_path / "set" / "00004.png").exists()


def test_pictures_that_were_changed_are_refused_by_hash(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    whole = make(tiny_bases["sd1"], tmp_path / "set")
    changed = tmp_path / "set" / "00003.png"
    Image.new("RGB", (32, 32)).save(changed)
    with pytest.raises(BadInput, match=r"\(00003\.png\)"):
        make(tiny_bases["sd1"], tmp_path / "set")
    changed.unlink()
    assert make(tiny_bases["sd1"], tmp_path / "set") == whole


def test_a_smaller_request_uses_the_larger_set(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    whole = make(tiny_bases["sd1"], tmp_path / "set")
    assert make(tiny_bases["sd1"], tmp_path / "set", SMALL.model_copy(update={"count": 2})) == whole[:2]
    made = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert len(made["pictures"]) == 5


def test_a_manifest_that_is_none(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[1")
    with pytest.raises(BadInput, match="is not a manifest"):
        make(tiny_bases["sd1"], tmp_path)


def test_the_default_folder_is_in_the_cache_and_safe(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    family = load_family(str(tiny_bases["sd1"]))
    one = SMALL.model_copy(update={"count": 1})
    folders = {class_images(family, ClassSet(one, noun, 32, "h"))[0].path.parent for noun in ("toy car", "../up", "")}
    assert {folder.parent for folder in folders} == {tmp_path / "class-images"}
    assert {folder.name[:-13] for folder in folders} == {"toy-car", "up", "class"}


def test_a_stale_set_is_refused_and_says_why(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    make(tiny_bases["sd1"], tmp_path / "set")
    with pytest.raises(BadInput, match="another steps"):
        make(tiny_bases["sd1"], tmp_path / "set", SMALL.model_copy(update={"steps": 3}))
    family = load_family(str(tiny_bases["sd1"]))
    with pytest.raises(BadInput, match="another base"):
        class_images(family, ClassSet(SMALL.model_copy(update={"folder": tmp_path / "set"}), "mug", 32, "other"))


def test_the_users_own_pictures_are_used_as_they_are(tiny_bases: dict[str, Path], photos: Path) -> None:
    before = sorted(file.name for file in photos.iterdir())
    family = load_family(str(tiny_bases["sd1"]))
    found = class_images(family, ClassSet(SMALL.model_copy(update={"folder": photos}), "mug", 32, "basehash"))
    assert [photo.path.name for photo in found] == before == sorted(file.name for file in photos.iterdir())


def test_the_subjects_own_photos_are_no_class_images(photos: Path, tmp_path: Path) -> None:
    """Also a copy under another name: with them the prior would teach that every mug is this one."""
    folder = tmp_path / "classes"
    shutil.copytree(photos, folder)
    own = scan(photos)
    next(folder.iterdir()).rename(folder / "another name.png")
    wanted = ClassSet(SMALL.model_copy(update={"folder": folder}), "mug", 32, "basehash")
    check_set(wanted)
    with pytest.raises(BadInput, match=r"prior\.folder.* holds photos of the subject \(.*leave prior.folder out"):
        check_set(wanted, own)
    for file in folder.iterdir():
        Image.new("RGB", (40, 40), (len(file.name), 0, 0)).save(file)
    check_set(wanted, own)


def test_a_set_grows_without_redrawing(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Also where the last chunk was cut short: number 2 is drawn again beside number 3, and not written again."""
    first = make(tiny_bases["sd1"], tmp_path / "set", SMALL.model_copy(update={"count": 3}))
    kept = [(tmp_path / "set" / f"{k:05d}.png").stat().st_mtime_ns for k in range(3)]
    more = make(tiny_bases["sd1"], tmp_path / "set", SMALL.model_copy(update={"count": 6}))
    assert more[:3] == first
    assert kept == [(tmp_path / "set" / f"{k:05d}.png").stat().st_mtime_ns for k in range(3)]


def test_images_that_were_drawn_otherwise_are_not_taken_for_these(tmp_path: Path) -> None:
    """A set of a version that drew SDXL without zeros for the empty negative prompt; other sets keep their place."""
    prior = SMALL.model_copy(update={"folder": None})
    plain = ClassSet(prior, "mug", 32, "hash")
    zeros = ClassSet(prior, "mug", 32, "hash", {"empty_negative": "zeros"})
    assert "drawing" not in plain.made_of
    assert plain.folder != zeros.folder
    own = SMALL.model_copy(update={"folder": tmp_path / "set"})
    made = ClassSet(own, "mug", 32, "hash").made_of | {"pictures": {}}
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(BadInput, match="another drawing"):
        check_set(ClassSet(own, "mug", 32, "hash", {"empty_negative": "zeros"}))


def test_the_bases_that_are_drawn_otherwise_say_so(tiny_bases: dict[str, Path]) -> None:
    said = {name: load_family(str(tiny_bases[name])).drawing for name in ("sd1", "sdxl", "flux")}
    assert said["sd1"].particulars("") == said["flux"].particulars("") == {}
    assert said["sdxl"].particulars("") == {"empty_negative": "zeros"}
    assert said["sdxl"].particulars("ugly") == {}


def sets_of(base: Path, photos: Path, without: Sequence[str] = (), **run: Any) -> Prepared:
    prior = {"kind": "class_images", "count": 1, "others": {"count": 1, "prompts": ["a car"]}}
    chosen = {"source": str(base), "without": list(without)}
    values = {"base": chosen, "prior": prior, "run": {"steps": 1} | run}
    method, optim = {"kind": "lora", "rank": 2}, {"kind": "adamw", "lr": 1e-3}
    data = {"photos": str(photos), "class_noun": "mug", "token": "zwx"}
    return prepare(parse_recipe(values | {"data": data, "method": method, "optim": optim}))


def folders_of(job: Prepared) -> list[Path]:
    others = other_set(job)
    assert others is not None
    return [wanted.folder for wanted in (*made_sets(job), others)]


def test_what_another_precision_draws_is_another_set(tiny_bases: dict[str, Path], photos: Path) -> None:
    """A run in fp32 took what a run in bf16 had drawn: its result told which of them was first."""
    fp32, bf16 = (sets_of(tiny_bases["sd1"], photos, precision=name) for name in ("fp32", "bf16"))
    assert not set(folders_of(fp32)) & set(folders_of(bf16))
    assert made_sets(bf16)[0].made_of["precision"] == "bf16"


def test_what_a_base_without_a_part_draws_is_another_set(tiny_bases: dict[str, Path], photos: Path) -> None:
    """SD3 without T5 reads other prompts, and is measured at other points."""
    whole = sets_of(tiny_bases["sd3"], photos)
    less = sets_of(tiny_bases["sd3"], photos, ["text_encoder_3"])
    assert (whole.family.left_out, less.family.left_out) == ([], ["text_encoder_3"])
    assert not set(folders_of(whole)) & set(folders_of(less))
    assert _drawn_by(whole) != _drawn_by(less)


def test_a_manifest_of_a_version_without_precisions_is_taken(tmp_path: Path) -> None:
    """Such a set may have been drawn in any."""
    own = SMALL.model_copy(update={"folder": tmp_path})
    wanted = [ClassSet(own, "mug", 32, "hash", precision=name) for name in ("fp32", "bf16")]
    older = {key: value for key, value in wanted[0].made_of.items() if key != "precision"} | {"pictures": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(older), encoding="utf-8")
    for one in wanted:
        check_set(one)
    (tmp_path / "manifest.json").write_text(json.dumps(wanted[0].made_of | {"pictures": {}}), encoding="utf-8")
    check_set(wanted[0])
    with pytest.raises(BadInput, match=r"another precision \('fp32' there, 'bf16' now\)"):
        check_set(wanted[1])


def test_the_manifest_keeps_what_another_run_drew_meanwhile(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the larger set's hashes, nobody would see that its images were changed."""
    folder, real = tmp_path / "set", class_sets.draw

    def meanwhile(*given: Any, **more: Any) -> Any:
        monkeypatch.setattr(class_sets, "draw", real)
        make(tiny_bases["sd1"], folder)
        return real(*given, **more)

    monkeypatch.setattr(class_sets, "draw", meanwhile)
    make(tiny_bases["sd1"], folder, SMALL.model_copy(update={"count": 1}))
    assert len(json.loads((folder / "manifest.json").read_text())["pictures"]) == 5
