"""A job does nothing twice: counted are searches, hashes, loads and predictions, never seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.data import tokens
from finetune.families import digests
from finetune.families.source import load_family
from finetune.jobs import stored_tokens
from finetune.jobs.stored_tokens import suggested
from finetune.jobs.train import train
from finetune.testing.tiny import write_tiny


def counting(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[Any]:
    """The first argument of every call of `place.name`, which still does its work."""
    real, calls = getattr(place, name), []
    monkeypatch.setattr(place, name, lambda *given, **named: calls.append(given[0]) or real(*given, **named))
    return calls


def test_a_token_is_searched_once_for_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again for another noun and another base; a damaged file is no answer."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    write_tiny("sd1", tmp_path / "base")
    family = load_family(str(tmp_path / "base"))
    wanted = [token.text for token in tokens.suggest(family, 2, "mug")]
    searches = counting(monkeypatch, stored_tokens.tokens, "suggest")
    assert [suggested(load_family(str(tmp_path / "base")), 2, "mug") for _ in range(3)] == [wanted] * 3
    assert len(searches) == 1
    suggested(family, 2, "dog")
    suggested(family, 1, "mug")
    assert len(searches) == 3
    write_tiny("sd1", tmp_path / "other", seed=1)
    suggested(load_family(str(tmp_path / "other")), 2, "mug")
    assert len(searches) == 4
    for text in ("{", '{"tokens": []}', '{"tokens": [1]}', "[]"):
        for file in (tmp_path / "cache" / "tokens").iterdir():
            file.write_text(text)
        before = len(searches)
        assert suggested(family, 2, "mug") == wanted
        assert len(searches) == before + 1
    shutil.rmtree(tmp_path / "cache")
    assert suggested(family, 2, "mug") == wanted


def test_nothing_is_hashed_twice(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Each file of the base, mask and class image once in a run, and not again in the next one."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    hashed = counting(monkeypatch, digests, "sha256")
    Image.new("L", (48, 40), 255).save(photos / "0.mask.png")
    recipe = parse_recipe(
        {
            "base": {"source": str(tiny_bases["sd1"])},
            "data": {"photos": str(photos), "class_noun": "mug", "masks": "auto"},
            "prior": {"kind": "class_images", "count": 3, "steps": 1},
            "method": {"kind": "lora", "rank": 2},
            "optim": {"kind": "adamw", "lr": 1e-4},
            "run": {"steps": 1, "batch_size": 1},
            "sample": {"prompts": [], "steps": 1},
            "export": {"formats": ["kohya"], "verify": "off"},
        }
    )
    train(recipe, tmp_path / "one")
    assert len(hashed) == len(set(hashed))
    drawn = {file.name for file in hashed if "class-images" in file.parts}
    assert drawn == {"00000.png", "00001.png", "00002.png"}
    assert {"0.mask.png", "vocab.json"} <= {file.name for file in hashed}
    hashed.clear()
    train(recipe, tmp_path / "two")
    assert hashed == []
    image = next((tmp_path / "cache" / "class-images").rglob("00001.png"))
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(BadInput, match=r"changed after they were drawn \(00001.png\)"):
        train(recipe, tmp_path / "three")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept() -> None:
    """The system gives pages once instead of 20 times to six buffers of 8 MB; counted by the kernel."""
    import resource

    faults = "resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
    program = (
        "import resource\nfrom finetune.core.allocator import keep_freed_memory\nkept = {call}\n"
        f"before = {faults}\nfor _ in range(20): [bytearray(8_000_000) for _ in range(6)]\n"
        f"print({faults} - before, kept)"
    )
    found = {}
    for call in ("False", "keep_freed_memory()"):
        command = [sys.executable, "-c", program.replace("{call}", call)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found[call] = done.stdout.split()
    if found["keep_freed_memory()"][1] == "False":
        pytest.skip("another C library")
    once = 6 * 8_000_000 // resource.getpagesize()
    assert int(found["keep_freed_memory()"][0]) < 1.5 * once < 10 * once < int(found["False"][0])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_between_pieces_in_use_goes_back() -> None:
    """200 MB of which every twentieth piece is still in use; counted by the kernel."""
    program = (
        "import pathlib\nfrom finetune.core.allocator import give_back_freed_memory\n"
        "def pages(): return int(pathlib.Path('/proc/self/statm').read_text().split()[1])\n"
        "pieces = [bytearray(20_000) for _ in range(10_000)]\nkept = pieces[::20]\ndel pieces\n"
        "before = pages()\nprint(give_back_freed_memory(), before - pages())"
    )
    done, given = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.split()
    if done == "False":
        pytest.skip("another C library")
    assert int(given) * os.sysconf("SC_PAGE_SIZE") > 100_000_000
