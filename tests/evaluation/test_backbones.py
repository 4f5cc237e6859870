"""What each network sees, against transformers' own processors and formulas by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from networks import SIDE, write_chain, write_clip, write_dino, write_dinov2, write_dinov3
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from finetune.core.errors import BadInput
from finetune.core.pickles import pickles_allowed
from finetune.evaluation.backbones.base import Backbone, Preparation
from finetune.evaluation.backbones.convnets import GRAM_LAYERS, LPIPS_LAYERS, alexnet, vgg19
from finetune.evaluation.backbones.inception import resized
from finetune.evaluation.registry import BACKBONES, METRICS
from finetune.families.digests import base_hash

WRITERS = {"dino": write_dino, "dinov2": write_dinov2, "dinov3": write_dinov3, "clip": write_clip}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three images of noise: wide, tall and square."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(((80, 61), (50, 75), (64, 64))):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("networks")
    return {kind: write(root / kind) for kind, write in WRITERS.items()}


def opened(kind: str, place: Path) -> Backbone:
    return BACKBONES[kind].opened(str(place), "dino")


def prepared(kind: str, folder: Path, files: list[Path]) -> torch.Tensor:
    """By transformers' own processor that works with Pillow."""
    wanted = ViTImageProcessorPil if kind in ("dino", "dinov3") else CLIPImageProcessorPil
    processor = wanted.from_pretrained(folder)
    return processor(images=[Image.open(file) for file in files], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_network_sees_what_transformers_shows_it(kind: str, folders: dict[str, Path], images: list[Path]) -> None:
    eye = opened(kind, folders[kind])
    pixels = prepared(kind, folders[kind], images)
    assert pixels.shape == (3, 3, SIDE, SIDE)
    ours = torch.stack([eye.prepare(Image.open(file)) for file in images])
    assert torch.allclose(ours, pixels, atol=1e-5)
    model = transformers.AutoModel.from_pretrained(folders[kind]).eval()
    with torch.no_grad():
        if kind == "clip":
            theirs = model.get_image_features(pixel_values=pixels).pooler_output
        else:
            theirs = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert np.allclose(eye.see(images), theirs.double().numpy(), atol=1e-5)
    assert eye.hash == base_hash(folders[kind])
    assert eye.name == kind


def test_clip_reads_texts_of_different_lengths_as_one_by_one(folders: dict[str, Path]) -> None:
    eye = opened("clip", folders["clip"])
    texts = ["a dog", "a photo of a red cat on the beach", "small"]
    model = transformers.CLIPModel.from_pretrained(folders["clip"]).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folders["clip"])
    with torch.no_grad():
        alone = [model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output for text in texts]
    assert np.allclose(eye.read(texts), torch.cat(alone).double().numpy(), atol=1e-5)
    assert eye.cut([*texts, "a dog " * 20]) == ["a dog " * 20]


def test_whole_numbers_of_older_files_are_read_as_transformers_reads_them(tmp_path: Path, images: list[Path]) -> None:
    folder = write_clip(tmp_path / "clip")
    file = folder / "preprocessor_config.json"
    values = json.loads(file.read_text()) | {"size": 36, "crop_size": SIDE}
    file.write_text(json.dumps(values))
    pixels = prepared("clip", folder, images)
    eye = opened("clip", folder)
    assert torch.allclose(torch.stack([eye.prepare(Image.open(item)) for item in images]), pixels, atol=1e-5)


def test_the_hash_is_of_the_content(folders: dict[str, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders["dino"], tmp_path / "copy")
    assert opened("dino", copied).hash == opened("dino", folders["dino"]).hash
    weights = load_file(copied / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, copied / "model.safetensors", {"format": "pt"})
    assert opened("dino", copied).hash != opened("dino", folders["dino"]).hash


def test_squared_distances_of_vgg_are_gatys_style_loss(tmp_path: Path, images: list[Path]) -> None:
    eye = opened("vgg", write_chain(vgg19(), tmp_path / "vgg.safetensors"))
    eye.preparation = Preparation((64, 64))  # type: ignore[attr-defined]  # the arithmetic of small images is the same
    rows = eye.see(images[:2])
    losses = []
    pixels = torch.stack([eye.prepare(Image.open(file)) for file in images[:2]])
    with torch.no_grad():
        values = pixels
        for number, layer in enumerate(eye.model):  # type: ignore[attr-defined]
            values = layer(values)
            if number in GRAM_LAYERS:
                assert isinstance(layer, nn.ReLU)
                flat = values.double().reshape(2, values.shape[1], -1).numpy()
                one, other = (np.einsum("ik,jk->ij", item, item) for item in flat)
                losses.append(((one - other) ** 2).sum() / (4 * flat.shape[1] ** 2 * flat.shape[2] ** 2))
    assert len(losses) == 5
    assert ((rows[0] - rows[1]) ** 2).sum() == pytest.approx(sum(losses) / 5, rel=1e-4)


def test_squared_distances_of_alexnet_are_lpips(tmp_path: Path, images: list[Path]) -> None:
    torch.manual_seed(0)
    lins = {f"lin{k}.model.1.weight": torch.rand(1, n, 1, 1) for k, n in enumerate((64, 192, 384, 256, 256))}
    write_chain(alexnet(), tmp_path / "alex.safetensors", **lins)
    eye = opened("lpips", tmp_path)
    rows = eye.see(images[:2])
    raw = [np.asarray(Image.open(file).resize((256, 256), 3), dtype=np.float32) / 127.5 - 1 for file in images[:2]]
    shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    values = torch.stack([torch.from_numpy((item - shift) / scale).float().permute(2, 0, 1) for item in raw])
    total = 0.0
    with torch.no_grad():
        for number, layer in enumerate(eye.model):  # type: ignore[attr-defined]
            values = layer(values)
            if number in LPIPS_LAYERS:
                unit = values / (values.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
                weight = lins[f"lin{LPIPS_LAYERS.index(number)}.model.1.weight"]
                total += float((((unit[0] - unit[1]) ** 2)[None] * weight).sum(1).mean())
    assert ((rows[0] - rows[1]) ** 2).sum() == pytest.approx(total, rel=1e-4)


class OpenAI(nn.Module):
    """A vision transformer as OpenAI wrote it, with its names."""

    def __init__(self, width: int = 128, patch: int = 8, side: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([self.block(width) for _ in range(blocks)])

    @staticmethod
    def block(width: int) -> nn.Module:
        block = nn.Module()
        block.attn = nn.MultiheadAttention(width, width // 64)
        block.ln_1, block.ln_2, block.mlp = nn.LayerNorm(width), nn.LayerNorm(width), nn.Module()
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.1)
        return block

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        places = self.conv1(images).flatten(2).permute(2, 0, 1)
        values = torch.cat([self.class_embedding.expand(1, len(images), -1), places])
        values = self.ln_pre(values + self.positional_embedding[:, None])
        for block in self.transformer.resblocks:
            normed = block.ln_1(values)
            values = values + block.attn(normed, normed, normed, need_weights=False)[0]
            inner = block.mlp.c_fc(block.ln_2(values))
            values = values + block.mlp.c_proj(inner * torch.sigmoid(1.702 * inner))
        return self.ln_post(values[0])


def test_csd_reads_the_published_names(tmp_path: Path, images: list[Path]) -> None:
    torch.manual_seed(0)
    model, style = OpenAI().eval(), torch.randn(128, 12)
    weights = {f"module.backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model_state_dict": weights | {"module.last_layer_style": style}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="--allow-pickle"):
        opened("csd", tmp_path / "pytorch_model.bin")
    with pickles_allowed():
        eye = opened("csd", tmp_path / "pytorch_model.bin")
    pixels = torch.stack([eye.prepare(Image.open(file)) for file in images])
    assert pixels.shape == (3, 3, 16, 16)
    with torch.no_grad():
        theirs = nn.functional.normalize(model(pixels) @ style, dim=1)
    assert np.allclose(eye.see(images), theirs.double().numpy(), atol=1e-5)


class Means(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ours hides them; the test writes the file
def test_a_copy_descriptor_runs_only_where_code_is_allowed(tmp_path: Path, images: list[Path]) -> None:
    file = tmp_path / "sscd.torchscript.pt"
    torch.jit.script(Means()).save(file)
    with pytest.raises(BadInput, match="--allow-pickle"):
        opened("copy", file)
    with pickles_allowed():
        eye = opened("copy", file)
    pixels = torch.stack([eye.prepare(Image.open(item)) for item in images])
    assert pixels.shape == (3, 3, 320, 320)
    assert np.allclose(eye.see(images), pixels.mean((2, 3)).double().numpy(), atol=1e-5)


def test_images_for_inception_are_smoothed_before_they_are_made_smaller() -> None:
    """Lines of one pixel become grey, which a filter without antialiasing makes to stripes; nothing is rounded."""
    lines = np.zeros((900, 900, 3), dtype=np.uint8)
    lines[:, ::2] = 255
    values = resized(Image.fromarray(lines), 299)
    assert values.shape == (3, 299, 299)
    assert float((values[:, 2:-2, 2:-2] - 127.5).abs().max()) < 16
    assert float((values - values.round()).abs().max()) > 0.1
    flat = resized(Image.new("RGB", (64, 40), (10, 200, 30)), 299)
    assert torch.allclose(flat[:, 5, 7], torch.tensor([10.0, 200.0, 30.0]), atol=1e-4)


def test_inception_names_the_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    (tmp_path / "inception.pth").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"torch-fidelity .*pip install 'finetune-diffusion\[evaluation\]'"):
        opened("inception", tmp_path / "inception.pth")


def test_what_is_no_such_network_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    plain = shutil.copytree(folders["dino"], tmp_path / "plain")
    (plain / "preprocessor_config.json").unlink()
    broken = shutil.copytree(folders["dino"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights[next(name for name in weights if "norm" in name)]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    bare, cut, pickled = (shutil.copytree(folders["dino"], tmp_path / name) for name in ("bare", "cut", "pickled"))
    (bare / "model.safetensors").unlink()
    (cut / "model.safetensors").write_bytes((folders["dino"] / "model.safetensors").read_bytes()[:-100])
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    mute = shutil.copytree(folders["clip"], tmp_path / "mute")
    for file in mute.glob("*"):
        if file.name.startswith(("tokenizer", "vocab", "merges")):
            file.unlink()
    odd = shutil.copytree(folders["dino"], tmp_path / "odd")
    (odd / "config.json").write_text("[]")
    text = tmp_path / "file.txt"
    text.write_text("no weights")
    cases = [
        ("dino", folders["clip"], "model_type 'clip', and not vit"),
        ("clip", folders["dino"], "model_type 'vit', and not clip"),
        ("dino", empty, "it has no config.json"),
        ("dino", text, "it is a file"),
        ("dino", plain, "preprocessor_config.json"),
        ("dino", broken, "missing or have another shape"),
        ("dino", bare, "--dino: .*has no weights that can be read"),
        ("dino", cut, "--dino: .*has no weights that can be read"),
        ("dino", pickled, "--dino: .*--allow-pickle"),
        ("dino", odd, "config.json"),
        ("clip", mute, "it has no tokenizer that can be read"),
        ("vgg", empty, r"no weights features\.0\.weight"),
        ("lpips", empty, r"no weights features\.0\.weight"),
        ("vgg", text, "--allow-pickle"),
        ("csd", empty, "0 weight files"),
        ("copy", empty, "it is no file"),
        ("dino", tmp_path / "nowhere", "there is no .*nowhere.*--dino DIR"),
    ]
    for kind, place, words in cases:
        with pytest.raises(BadInput, match=words):
            opened(kind, place)
    for kind in ("vgg", "lpips", "csd", "copy", "inception"):
        with pytest.raises(BadInput, match=f"--{kind} FILE"):
            BACKBONES[kind].opened(None, "some")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_network_that_cannot_be_fetched_is_named_with_its_option(kind: str) -> None:
    with pytest.raises(BadInput, match=rf"needs the network {BACKBONES[kind].hub}.*--{kind} DIR"):
        BACKBONES[kind].opened(None, "some")


def test_every_metric_has_a_network_and_says_what_it_can_tell() -> None:
    assert set(METRICS) == {
        "clip_i", "clip_t", "copies", "csd", "dino", "dinov2", "dinov3", "div", "div_dino", "fid", "gram",
        "kid", "pres",
    }  # fmt: skip
    for metric in METRICS.values():
        assert metric.backbone in BACKBONES
        assert all((metric.title, metric.meaning, metric.blind, metric.source))
        if metric.default:
            assert BACKBONES[metric.backbone].hub
