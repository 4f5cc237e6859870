"""Bad adapter files and arguments: one sentence, no traceback, nothing written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_files import Tensors, kohya_file, saved

from finetune.adapters.targets import model_format, target_of, weighted
from finetune.cli.main import run
from finetune.core.errors import BadInput

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP = ".lora_down.weight", ".lora_up.weight"
TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def base(tiny_bases: dict[str, Path]) -> Path:
    return tiny_bases["sd1"]


@pytest.fixture
def sound(base: Path) -> Tensors:
    return {key: value for key, value in kohya_file(base).items() if "mid_block" in key}


def header_of(text: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text


def tensor_header(shape: list[int], end: int, key: str = f"{QUERY}{DOWN}", dtype: str = "F32") -> bytes:
    return header_of(json.dumps({key: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode())


# bytes of a file -> what the sentence says
BYTES: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a header of 2^60 bytes": header_of(b"{}", 2**60),
    "not JSON": header_of(b"{not json"),
    "a list": header_of(b"[1, 2]"),
    "a tensor beyond the end": tensor_header([4, 4], 64) + b"\0" * 8,
    "a size that does not match": tensor_header([5, 4], 64) + b"\0" * 64,
    "an unknown kind of number": tensor_header([4, 4], 64, dtype="Q9") + b"\0" * 64,
    "a negative size": tensor_header([-4, 4], 64) + b"\0" * 64,
    "no tensors": header_of(b"{}"),
    "a zip": b"PK\x03\x04" + b"\0" * 100,
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 151\n",
}


@pytest.mark.parametrize("command", ["verify", "convert", "merge"])
@pytest.mark.parametrize("fault", BYTES)
def test_damaged_files(fault: str, command: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(BYTES[fault])
    extra = [] if command == "verify" else ["--out", str(tmp_path / "out")]
    refused([command, str(file), *extra], "bad.safetensors", tmp_path, {file})


def refused(arguments: list[str], words: str, folder: Path, there: set[Path]) -> None:
    """The command ends with exit code 2 and one sentence, and leaves no file."""
    code, message = run(arguments)
    assert code == 2, message
    assert words in message
    assert "\n" not in message
    assert len(message) < 700
    assert {path for path in folder.rglob("*") if path.is_file()} == there


SPOILED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "NaN": (lambda t: t[QUERY + UP].fill_(float("nan")), "NaN"),
    "half a pair": (lambda t: t.pop(QUERY + UP), "without their up"),
    "exchanged": (lambda t: t.update({QUERY + UP: t[QUERY + DOWN], QUERY + DOWN: t[QUERY + UP]}), "exchanged"),
    "a stranger": (lambda t: t.update(optimizer=torch.ones(2)), "optimizer"),
    "an alpha without matrices": (lambda t: t.update({"lora_unet_x.alpha": torch.ones(1)}), "lora_unet_x"),
    "another method": (lambda t: t.update({f"{QUERY}.dora_scale": torch.ones(4)}), "DoRA"),
    "whole numbers": (lambda t: t.update({QUERY + UP: t[QUERY + UP].to(torch.int8)}), "floating"),
    "an up of another rank": (lambda t: t.update({QUERY + UP: torch.ones(4, 3)}), "another shape"),
    "a module that is there twice": (
        lambda t: t.update({QUERY.replace("mid_block_attentions_0", "middle_block_1") + end: t[QUERY + end].clone()
                            for end in (DOWN, UP, ".alpha")}), "twice"),
    "two keys for one matrix": (
        lambda t: t.update({f"{QUERY}.lora_B.weight": t[QUERY + UP].clone()}), "fit nothing"),
    "all zero": (lambda t: [value.zero_() for key, value in t.items() if key.endswith(UP)], "changes nothing"),
    "alpha of three numbers": (lambda t: t.update({f"{QUERY}.alpha": torch.ones(3)}), "another shape"),
    "an infinite product": (lambda t: (t[QUERY + UP].fill_(3e38), t.update({f"{QUERY}.alpha": torch.tensor(1e4)})),
                            "infinite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SPOILED)
def test_what_can_not_be_read_whole_is_not_converted(fault: str, sound: Tensors, base: Path, tmp_path: Path) -> None:
    spoil, words = SPOILED[fault]
    spoil(sound)
    file = saved(sound, tmp_path / "bad.safetensors")
    arguments = ["convert", str(file), "--out", str(tmp_path / "new"), "--base", str(base)]
    refused(arguments, words, tmp_path, {file})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "{x}:nan", "--out", "{out}"], "nan"),
        (["merge", "{x}:inf", "--out", "{out}"], "inf"),
        (["merge", "{x}:1e30", "--out", "{out}"], "1e30"),
        (["merge", "{x}:", "--out", "{out}"], "weight after the colon is missing"),
        (["merge", "{x}:abc", "--out", "{out}"], "'abc' is not a weight"),
        (["merge", "{x}:0", "--out", "{out}"], "not 0"),
        (["merge", "{x}:0.5", "/nowhere.safetensors", "--out", "{out}"], "/nowhere.safetensors"),
        (["merge", "{x}", "--to", "kohya", "--to", "folder", "--out", "{out}"], "several results"),
        (["merge", "{x}", "--to", "folder", "--rank", "4", "--out", "{out}"], "--rank 4"),
        (["merge", "{x}", "--to", "folder", "--out", "{out}.safetensors"], "writes a folder"),
        (["convert", "{x}", "--to", "folder", "--out", "{out}"], "not a format of LoRA files"),
        (["convert", "{x}", "--to", "embedding", "--out", "{out}"], "not a format of LoRA files"),
        (["convert", "{x}", "--to", "peft", "--out", "{out}.safetensors"], "writes a folder"),
        (["convert", "{x}", "--to", "kohia", "--out", "{out}"], "kohya"),
        (["convert", "{x}", "--out", "{out}.ckpt"], ".ckpt"),
        (["convert", "{x}", "--out", "{x}/new"], "not a folder"),
        (["convert", "{x}", "--out", "{x}/"], "is a file, not a folder"),
        (["convert", "{x}", "--out", ""], "names no file"),
        (["convert", "{x}", "--out", "{x}"], "already exists"),
        (["convert", "{x}", "--dtype", "int4", "--out", "{out}"], "int4"),
        (["resize", "{x}", "--rank", "2", "--energy", "0.9", "--out", "{out}"], "--rank or --energy"),
        (["verify", "{x}", "--base", "/nowhere"], "/nowhere"),
        (["verify", "{folder}"], "not a PEFT folder"),
    ],
)
def test_bad_arguments(
    arguments: list[str], words: str, sound: Tensors, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = saved(sound, tmp_path / "x.safetensors")
    names = {"x": file, "out": tmp_path / "out", "folder": tmp_path}
    filled = [text.format(**names) for text in arguments]
    refused([*filled, *([] if "--base" in filled else ["--base", str(base)])], words, tmp_path, {file})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "{x}", "--to", "folder", "--out", "{out}"], "--base BASE"),
        (["merge", "{x}", "--to", "checkpoint", "--out", "{out}"], "--base BASE"),
        (["extract", "{base}", "--out", "{out}"], "--base BASE"),
        (["convert", "{x}", "--out", "{out}"], "--base BASE"),
        (["resize", "{x}", "--rank", "1", "--out", "{out}"], "--base BASE"),
        (["inspect", "{x}"], "finetune verify"),
        (["inspect", "{run}"], "finetune report"),
        (["verify", "{run}"], "run folder"),
    ],
)
def test_what_needs_a_base_or_another_command_says_so(
    arguments: list[str], words: str, sound: Tensors, base: Path, tmp_path: Path
) -> None:
    file = saved(sound, tmp_path / "x.safetensors")
    ran = tmp_path / "run" / "recipe.yaml"
    ran.parent.mkdir()
    ran.write_text("base: tiny\n")
    names = {"x": file, "out": tmp_path / "out", "base": base, "run": ran.parent}
    refused([text.format(**names) for text in arguments], words, tmp_path, {file, ran})


def test_values_beyond_a_precision_are_refused_before_writing(sound: Tensors, base: Path, tmp_path: Path) -> None:
    """fp16 ends at 65504."""
    sound[QUERY + UP].fill_(1e6)
    sound[QUERY + DOWN].fill_(1e6)
    file = saved(sound, tmp_path / "large.safetensors")
    arguments = ["convert", str(file), "--dtype", "fp16", "--base", str(base), "--out", str(tmp_path / "out")]
    refused(arguments, "too large for fp16", tmp_path, {file})


@pytest.mark.parametrize(
    ("out", "written"),
    [
        ("o.safetensors", "o.safetensors"), ("new/", "new/x.safetensors"), ("there", "there/x.safetensors"),
        ("deep/er/o", "deep/er/o.safetensors"), ("v1.5", "v1.5.safetensors"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [["convert"], ["resize", "--rank", "1"], ["merge"]])
def test_out_names_the_file_or_the_folder(
    command: list[str], out: str, written: str, sound: Tensors, base: Path, tmp_path: Path
) -> None:
    file = saved(sound, tmp_path / "x.safetensors")
    (tmp_path / "w" / "there").mkdir(parents=True)
    arguments = [*command, str(file), "--out", f"{tmp_path}/w/{out}", "--base", str(base)]
    assert run(arguments) == (0, "")
    found = [path.relative_to(tmp_path / "w").as_posix() for path in (tmp_path / "w").rglob("*") if path.is_file()]
    assert found == [written]
    code, message = run(arguments)
    assert (code, "--force" in message) == (2, True)
    assert run([*arguments, "--force"])[0] == 0


def test_a_diffusers_file_gets_the_name_that_is_asked_for(sound: Tensors, base: Path, tmp_path: Path) -> None:
    file = saved(sound, tmp_path / "x.safetensors")
    out = tmp_path / "o.safetensors"
    assert run(["convert", str(file), "--to", "diffusers", "--out", str(out), "--base", str(base)]) == (0, "")
    assert out.is_file()


def test_arguments_that_are_fine() -> None:
    assert weighted("a.safetensors:-0.5") == (Path("a.safetensors"), -0.5)
    assert weighted("a.safetensors") == (Path("a.safetensors"), 1.0)
    assert model_format(["kohya", "peft"], 4) is None
    assert model_format(["checkpoint"], None) == "checkpoint"
    with pytest.raises(BadInput, match="names no file"):
        target_of(" ", "x")
