"""dedupe by a network's features: small random networks of the true classes, against transformers and plain loops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from networks import write_clip, write_dino, write_dinov2, write_dinov3
from test_findings_of_a_set import texture
from torch import Tensor, nn

from data_tools import embeddings
from data_tools.__main__ import main
from data_tools.dedupe import SameBy, dedupe
from data_tools.embeddings import Embedder, alike_pairs
from finetune.core.errors import BadInput
from finetune.core.pickles import pickles_allowed
from finetune.data.decoding import open_image
from finetune.data.leftovers import MANIFEST


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five photos that hashes tell apart."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        texture(number).save(folder / f"{number}.png")
    return folder


def cosines_of(folder: Path, files: list[Path]) -> np.ndarray:
    """By transformers alone: the class tokens of a ViT, each with each."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        seen = model(**processor(images=[open_image(file) for file in files], return_tensors="pt"))
    token = torch.nn.functional.normalize(seen.last_hidden_state[:, 0].double(), dim=1)
    return (token @ token.T).numpy()


def test_pairs_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(11, 3))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    wanted = {(a, b) for b in range(11) for a in range(b) if values[a] @ values[b] >= 0.5}
    assert 5 < len(wanted) < 40
    for block in (1, 3, 100):
        monkeypatch.setattr(embeddings, "BLOCK", block)
        found = alike_pairs(values, 0.5)
        assert {(a, b) for a, b, _ in found} == wanted
        assert len(found) == len(wanted)
        assert all(cosine == pytest.approx(values[a] @ values[b], abs=1e-6) for a, b, cosine in found)


@pytest.mark.parametrize("write", [write_dino, write_dinov2])
def test_photos_with_the_same_features_go(write: Callable[[Path], Path], photos: Path, tmp_path: Path) -> None:
    network = write(tmp_path / "network")
    assert all(step.action == "copied" for step in dedupe(photos, tmp_path / "plain").plan.steps)
    files = sorted(photos.glob("*.png"))
    own = cosines_of(network, files)
    ranked = sorted(((own[a, b], a, b) for b in range(5) for a in range(b)), reverse=True)
    (highest, first, second), (next_one, *_) = ranked[:2]
    least = (highest + next_one) / 2
    done = dedupe(photos, tmp_path / "out", SameBy(embedder=Embedder(str(network)), alike=least))
    left = {step.source.name: step.why for step in done.plan.steps if step.action == "left out"}
    assert len(left) == 1
    assert left.keys() <= {f"{first}.png", f"{second}.png"}
    assert f"cosine of features {highest:.2f}" in next(iter(left.values()))
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["settings"]["sha256"] == Embedder(str(network)).network.hash


def test_dinov3_is_known(photos: Path, tmp_path: Path) -> None:
    """transformers' own preparation of it needs torchvision; tests/evaluation compares ours with its numbers."""
    embedder = Embedder(str(write_dinov3(tmp_path / "network")))
    assert embedder.network.kind == "dinov3"
    assert len(embedder.see(sorted(photos.glob("*.png")))) == 5


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def test_a_copy_descriptor_needs_permission(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "sscd.torchscript.pt"
    torch.jit.script(Means()).save(file)
    with pytest.raises(BadInput, match="--allow-pickle"):
        Embedder(str(file))
    with pickles_allowed():
        embedder = Embedder(str(file))
    assert embedder.alike == 0.75
    values = embedder.see(sorted(photos.glob("*.png")))
    assert values.shape == (5, 3)
    assert np.linalg.norm(values, axis=1) == pytest.approx(1)


def test_what_can_not_be_compared_is_said(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip, out = write_clip(tmp_path / "clip"), str(tmp_path / "out")
    for arguments, words in [
        (["--alike", "0.9"], "--embedder"),
        (["--embedder", str(clip)], "its model_type is 'clip'"),
        (["--embedder", str(photos)], "has no config.json"),
        (["--embedder", "nowhere"], "there is no nowhere"),
        (["--embedder", str(write_dino(tmp_path / "dino")), "--alike", "1.5"], "--alike is 1.5"),
        (["--embedder", str(tmp_path / "dino"), "--alike", "nan"], "--alike is nan"),
    ]:
        assert main(["dedupe", str(photos), out, *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
        assert not Path(out).exists()
