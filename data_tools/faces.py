"""Looks for faces with the cascades that OpenCV 4 brings along: no weights are downloaded. An optional package.

One cascade alone calls much a face that is none. Three that were trained apart seldom agree on the same mistake, so a
face counts where all three see one. Faces in profile, and those turned by more than about 10 degrees, are not found.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
from PIL import Image

from finetune.data.blobs import Box

NAMES = ("alt", "alt2", "default")  # of haarcascade_frontalface_*.xml
SIDE = 512  # pixels: the longer side of the copy that is looked at
ROOM = 96  # pixels of grey around it, so that a face that the edge cuts is found too
STEP, NEIGHBOURS, LEAST = 1.1, 3, 32  # between two sizes of a face, windows that agree, and pixels of the smallest
SAME = 0.4  # of two boxes' union: what they share if they are of one face
HOW = "pip install 'finetune-diffusion[faces]', or give a detector with --detector"


class Faces:
    """Finds faces. `cv2` is OpenCV's module; its cascades are read once.

    Raises:
        OSError: this OpenCV has no cascades.
    """

    def __init__(self, cv2: Any) -> None:
        if not hasattr(cv2, "CascadeClassifier"):
            raise OSError(f"OpenCV {getattr(cv2, '__version__', '')} has no cascades")
        folder = cv2.data.haarcascades
        files = [os.path.join(folder, f"haarcascade_frontalface_{name}.xml") for name in NAMES]
        self.cascades = [cv2.CascadeClassifier(file) for file in files]
        if any(cascade.empty() for cascade in self.cascades):
            raise OSError(f"OpenCV's cascades in {folder} can't be read")

    def find(self, image: Image.Image) -> list[Box]:
        """The faces in an RGB image; a box may begin below 0 or end above 1, where the edge cuts the face."""
        scale = min(1.0, SIDE / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        grey = np.asarray(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0).convert("L"))
        padded = np.pad(grey, ROOM, constant_values=round(float(grey.mean())))
        found: list[np.ndarray] = []
        for number, cascade in enumerate(self.cascades):
            seen = cascade.detectMultiScale(padded, STEP, NEIGHBOURS, 0, (LEAST, LEAST))
            boxes = [np.array(box, dtype=float) for box in seen]
            found = boxes if not number else [face for face in found if any(_alike(face, box) for box in boxes)]
            if not found:
                return []
        return [_as_shares(box, size) for box in found]


def load_faces() -> tuple[Faces | None, str]:
    """What finds faces, and why there is nothing that does, in a sentence; one of both is empty."""
    try:
        return Faces(importlib.import_module("cv2")), ""
    except ImportError:
        return None, f"faces were not looked for, since OpenCV is not installed: {HOW}"
    except OSError as error:
        return None, f"faces were not looked for ({error}): {HOW}"


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    sides = np.minimum(one[:2] + one[2:], other[:2] + other[2:]) - np.maximum(one[:2], other[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    return shared > SAME * (float(np.prod(one[2:]) + np.prod(other[2:])) - shared)


def _as_shares(box: np.ndarray, size: tuple[int, int]) -> Box:
    left, top, width, height = (float(value) for value in box)
    left, top = left - ROOM, top - ROOM
    return left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1]
