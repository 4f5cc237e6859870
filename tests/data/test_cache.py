"""The caches give what the frozen parts give, bit for bit, whatever was on the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.core.errors import BadInput
from finetune.data import shards
from finetune.data.cache import CacheOptions, LatentCache, PromptCache
from finetune.data.crops import Crop, make_crops
from finetune.data.photos import scan
from finetune.families.base import Family
from finetune.families.source import load_family


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def family(request: pytest.FixtureRequest, tiny_bases: dict[str, Path]) -> Family:
    return load_family(str(tiny_bases[request.param]))


def all_views(folder: Path) -> list[Crop]:
    return [view for photo in scan(folder) for view in make_crops(photo, 32, "center", 1, True, 0)]


def test_latents_are_the_vaes_own(family: Family, photos: Path, tmp_path: Path) -> None:
    """Against diffusers' encoder on one view, scaled as its pipeline scales it."""
    cache, wanted = LatentCache(tmp_path, "base"), all_views(photos)
    counted: list[int] = []
    cache.fill(family, wanted, counted.append)
    assert sum(counted) == len(wanted) == 6
    vae = family.parts["vae"]
    with torch.no_grad():
        own = vae.encode(wanted[3].pixels()[None]).latent_dist
    held = cache.latents(wanted[3])
    assert torch.equal(held.mean, own.mean[0] * vae.config.scaling_factor)
    assert torch.equal(held.std, own.std[0] * vae.config.scaling_factor)


def test_a_warm_a_cold_and_a_damaged_cache_are_the_same_bits(
    family: Family, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of two entries. One is cut off and one is gone: their entries are made again, the others stay."""
    monkeypatch.setattr(shards, "MOST_ENTRIES", 2)
    wanted = all_views(photos)
    cold = LatentCache(tmp_path / "a", "base")
    cold.fill(family, wanted)
    files = sorted((tmp_path / "a").rglob("*.safetensors"))
    assert len(files) == len(wanted) / 2
    files[0].write_bytes(files[0].read_bytes()[:40])
    files[1].unlink()
    kept = {file: file.stat().st_mtime_ns for file in files[2:]}
    warm = LatentCache(tmp_path / "a", "base")
    warm.fill(family, wanted)
    for view in wanted:
        assert torch.equal(warm.latents(view).mean, cold.latents(view).mean)
        assert torch.equal(warm.latents(view).std, cold.latents(view).std)
    assert {file: file.stat().st_mtime_ns for file in files[2:]} == kept
    assert entries_in(tmp_path / "a") == 6
    read_in_place = LatentCache(tmp_path / "a", "base")
    monkeypatch.setattr(shards, "IN_MEMORY", 1)
    read_in_place.fill(family, wanted)
    for view in wanted:
        assert torch.equal(read_in_place.latents(view).mean, cold.latents(view).mean)


def entries_in(folder: Path) -> int:
    return sum(len(load_file(file)["keys"]) for file in folder.rglob("*.safetensors"))


def test_another_base_or_precision_is_another_file(family: Family, photos: Path, tmp_path: Path) -> None:
    wanted = all_views(photos)[:1]
    for base, dtype in (("one", torch.float32), ("two", torch.float32), ("one", torch.bfloat16)):
        LatentCache(tmp_path, base, dtype).fill(family, wanted)
    LatentCache(tmp_path, "one", options=CacheOptions(narrow=True)).fill(family, wanted)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_a_narrow_cache_holds_fp16_and_gives_the_same_cold_and_warm(
    family: Family, photos: Path, tmp_path: Path
) -> None:
    wanted, narrow = all_views(photos), CacheOptions(narrow=True)
    exact, cold, warm = (LatentCache(tmp_path, "base", options=each) for each in (CacheOptions(), narrow, narrow))
    for cache in (exact, cold, warm):
        cache.fill(family, wanted)
    for view in wanted:
        assert torch.equal(cold.latents(view).mean, exact.latents(view).mean.half().float())
        assert torch.equal(cold.latents(view).std, warm.latents(view).std)
    assert cold.latents(wanted[0]).mean.dtype == torch.float32
    (file,) = cold.shards.folder.glob("*.safetensors")
    assert load_file(file)["fp16.mean"].dtype == torch.float16


def test_several_workers_make_the_same_bits(
    family: Family, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MOST_ENTRIES", 4)
    wanted = all_views(photos)
    one, several = (
        LatentCache(tmp_path / "1", "base"),
        LatentCache(tmp_path / "3", "base", options=CacheOptions(False, 3, 3)),
    )
    one.fill(family, wanted)
    several.fill(family, wanted)
    for folder in ("1", "3"):
        assert len(list((tmp_path / folder).rglob("*.safetensors"))) == 2
    assert [file.name for file in sorted((tmp_path / "1").rglob("*.safetensors"))] == [
        file.name for file in sorted((tmp_path / "3").rglob("*.safetensors"))
    ], "the same files, byte for byte"
    assert torch.get_num_threads() == 1


class Ends(Exception):
    pass


def test_what_was_made_before_an_end_is_kept(family: Family, photos: Path, tmp_path: Path) -> None:
    wanted, seen = all_views(photos), []

    def advance(amount: int) -> None:
        seen.append(amount)
        if sum(seen) == 4:
            raise Ends

    with pytest.raises(Ends):
        LatentCache(tmp_path, "base").fill(family, wanted, advance)
    assert entries_in(tmp_path) == 4
    assert not list(tmp_path.rglob("*.tmp"))
    again = LatentCache(tmp_path, "base")
    assert len(again.shards.find(view.key for view in wanted)) == 2


def test_a_shard_that_goes_while_it_is_used_is_named(
    family: Family, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed, or damaged in one entry: what is read from the disk is checked each time."""
    monkeypatch.setattr(shards, "IN_MEMORY", 1)
    wanted = all_views(photos)
    for change in (lambda file: flip(file, file.stat().st_size // 2), lambda file: file.unlink()):
        cache = LatentCache(tmp_path, "base")
        cache.fill(family, wanted)
        (file,) = tmp_path.rglob("*.safetensors")
        change(file)
        with pytest.raises(BadInput, match=r"was removed or damaged while it was used: start the run again"):
            [cache.latents(view) for view in wanted]


def test_prompts_are_the_encoders_own_and_come_back_from_the_disk(family: Family, tmp_path: Path) -> None:
    prompts = ["", "a photo of a dog", "a red mug on the beach"]
    cache = PromptCache(family, "base", tmp_path)
    cache.fill(prompts)
    with torch.no_grad():
        own = family.encode_prompts(prompts)
    got = cache([prompts[2], prompts[0], prompts[2]])
    assert got.keys() == own.keys()
    for name, value in own.items():
        torch.testing.assert_close(got[name], value[[2, 0, 2]], rtol=0, atol=1e-5)
    damaged = min(tmp_path.rglob("*.safetensors"))
    damaged.write_bytes(b"x" * 100)
    again = PromptCache(family, "base", tmp_path)
    again.fill(prompts)
    for name in own:
        assert torch.equal(again(prompts)[name], cache(prompts)[name])


DAMAGES = {
    "a flipped bit": lambda file, other: flip(file, -1),
    "another entry's file": lambda file, other: file.write_bytes(other.read_bytes()),
    "zeros": lambda file, other: save_file({k: v * 0 for k, v in load_file(file).items()}, file, told(file)),
    "other names": lambda file, other: save_file({"x": torch.ones(2)}, file, told(file)),
    "another shape": lambda file, other: save_file(
        {k: v[..., :1].contiguous() for k, v in load_file(file).items()}, file, told(file)
    ),
    "no header": lambda file, other: save_file(load_file(file), file),
}


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(bytes(content))


def told(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_wrong_entry_is_made_again(
    damage: str, family: Family, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents and prompts: whatever lies in the file's place, what is read is what the frozen parts give."""
    monkeypatch.setattr(shards, "MOST_ENTRIES", 1)
    wanted, prompts = all_views(photos)[:2], ["a dog", "a red mug"]
    latents, texts = LatentCache(tmp_path, "base"), PromptCache(family, "base", tmp_path)
    latents.fill(family, wanted)
    texts.fill(prompts)
    for folder in ("latents", "prompts"):
        files = sorted((tmp_path / folder).rglob("*.safetensors"))
        DAMAGES[damage](files[0], files[-1])
    again, texts_again = LatentCache(tmp_path, "base"), PromptCache(family, "base", tmp_path)
    again.fill(family, wanted)
    texts_again.fill(prompts)
    for crop in wanted:
        assert torch.equal(again.latents(crop).mean, latents.latents(crop).mean)
        assert torch.equal(again.latents(crop).std, latents.latents(crop).std)
    for name, value in texts(prompts).items():
        assert torch.equal(texts_again(prompts)[name], value)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="counts this process's memory maps")
def test_entries_that_were_read_hold_no_map_and_no_file(family: Family, photos: Path, tmp_path: Path) -> None:
    """A process may have 65,530 maps, and fewer open files: as many images would be the end of it."""
    wanted = all_views(photos)
    prompts = [f"a mug {number}" for number in range(9)]
    for _ in range(2):  # made, then read
        latents, texts = LatentCache(tmp_path, "base"), PromptCache(family, "base", tmp_path)
        latents.fill(family, wanted)
        texts.fill(prompts)
    assert all(latents.latents(view).mean.shape == (4, 16, 16) for view in wanted)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [file for file in opened if file.startswith(str(tmp_path))]


def test_a_photo_that_changes_before_it_is_encoded_does_not_take_its_old_entry(
    family: Family, photos: Path, tmp_path: Path
) -> None:
    """Between scan and cache a run draws class images, for an hour. An entry of other content under the photo's hash
    would be read by every later run with that photo."""
    wanted = all_views(photos)[:1]
    file = wanted[0].photo.path
    before = file.read_bytes()
    Image.new("RGB", wanted[0].photo.size, "red").save(file)
    with pytest.raises(BadInput, match=f"{file.name} changed since it was first read"):
        LatentCache(tmp_path, "base").fill(family, wanted)
    file.write_bytes(before)
    cache = LatentCache(tmp_path, "base")
    cache.fill(family, wanted)
    assert torch.equal(cache.latents(wanted[0]).mean, family.codec.encode(wanted[0].pixels()[None]).mean[0])
