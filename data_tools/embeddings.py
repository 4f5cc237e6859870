"""Photos of the same thing by a network's features: what perceptual hashes do not see, such as another crop.

The networks are those of `finetune evaluate`: DINO, DINOv2 or DINOv3 as folders that transformers reads, and a
copy-detection descriptor such as SSCD (arXiv:2202.10261) as a TorchScript file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.vision import model_type_of
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.evaluation.backbones.base import Backbone
from finetune.evaluation.backbones.copy import Copy
from finetune.evaluation.backbones.hub import DinoNetwork, DinoV2Network, DinoV3Network, HubBackbone
from finetune.evaluation.statistics import Vectors

OPTION = "--embedder"
EXAMPLES = "facebook/dinov2-small, or SSCD's sscd_disc_mixup.torchscript.pt"
NETWORKS: tuple[type[HubBackbone], ...] = (DinoNetwork, DinoV2Network, DinoV3Network)
# cosines: SSCD's authors name .75 for a precision of .9; of DINO, which knows things and not copies, this is a rule
COPY_ALIKE, DINO_ALIKE = 0.75, 0.95
TOGETHER = 64  # photos between two reports
BLOCK = 512  # photos that are compared with all at once: 200 MB for 100,000


class Embedder:
    """Gives photos their features.

    Attributes:
        network: the network.
        alike: the cosine from which two photos are the same, unless another is given.

    Raises:
        BadInput: `source` is no folder, file or hub id of such a network, or TorchScript without permission.
    """

    def __init__(self, source: str) -> None:
        place = Path(source).expanduser()
        if place.is_file():
            self.network: Backbone = Copy(place, source)
            self.alike = COPY_ALIKE
            return
        folder, kind = model_type_of(source, OPTION, EXAMPLES)
        found = next((network for network in NETWORKS if kind in network.classes), None)
        if found is None:
            raise BadInput(f"{OPTION} {source} is no DINO (its model_type is {kind!r}): give one such as {EXAMPLES}")
        self.network, self.alike = found(folder, source), DINO_ALIKE

    def see(self, files: Sequence[Path]) -> Vectors:
        """Files of photos that can be read -> [files, width] float64, each of length 1."""
        found = []
        with phase("Features", len(files), "photos") as advance:
            for start in range(0, len(files), TOGETHER):
                some = files[start : start + TOGETHER]
                found.append(self.network.see(some))
                advance(len(some), "")
        values: Vectors = np.concatenate(found)
        values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        return values


def alike_pairs(values: Vectors, least: float) -> list[tuple[int, int, float]]:
    """The pairs (first, second, cosine) of rows [n, width] of length 1 whose cosine is at least `least`.

    All are compared, which takes 7 s for 30,000 rows of 384 on one core, and grows with the square.
    """
    rows, found = values.astype(np.float32), []
    for start in range(0, len(rows), BLOCK):
        cosines = rows[start : start + BLOCK] @ rows[: start + BLOCK].T
        for first, second in np.argwhere(cosines >= least):
            if second < start + first:
                found.append((int(second), int(start + first), float(cosines[first, second])))
    return found
