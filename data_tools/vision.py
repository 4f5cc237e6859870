"""Networks that find or mask a photo's subject: detectors and segmenters that transformers reads, where one is given.

Only transformers' own classes are used, and weights that are no pickles. A folder whose class is Python code of its
own, as BiRefNet's is, runs that code: only with `code=True`, which the user must ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_tools.segment import resized
from finetune.core.errors import BadInput
from finetune.core.reading import read_json
from finetune.data.blobs import Box
from finetune.families.weights import load_weights

LEAST = 0.3  # score: what is less certain is not told
SIDE = 1024  # pixels: the longer side of a mask from a network
CODE_SIDE = 1024  # pixels: the square that BiRefNet looks at
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which it uses
OTHERS = ("oneformer", "videomt")  # they read a task in words, or a film
PATTERNS = ["*.json", "*.txt", "*.model", "*.safetensors"]
DETECTORS = "facebook/detr-resnet-50, PekingU/rtdetr_v2_r50vd, google/owlv2-base-patch16-ensemble"
SEGMENTERS = "facebook/mask2former-swin-tiny-coco-instance, ZhengPeng7/BiRefNet with --allow-code"


@dataclass(frozen=True)
class Found:
    """A thing in a photo: what it is, how certain (0 to 1), and where, as shares of the sides."""

    name: str
    score: float
    box: Box


class Detector:
    """Finds things and says where they are.

    `source` is a folder or hub id of a detector. `names` are what to look for: words for detectors that read text
    (OWLv2, Grounding DINO), which need some; otherwise names of the detector's own classes, and none for all of them.

    Raises:
        BadInput: it can't be loaded, is no detector, or lacks a class of that name.
    """

    def __init__(self, source: str, names: Sequence[str] = ()) -> None:
        from transformers import AutoImageProcessor, AutoProcessor
        from transformers.models.auto import modeling_auto as known

        self.folder, kind = model_type_of(source, "--detector", DETECTORS)
        self.reads_text = kind in known.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES
        if not self.reads_text and kind not in known.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
            raise BadInput(f"{source} is no detector (its model_type is {kind!r}): give one such as {DETECTORS}")
        if self.reads_text and not names:
            raise BadInput(f"the detector {source} looks for what words say: give them, as in --find 'a dog'")
        self.names = list(names)
        self.processor = _prepared(AutoProcessor if self.reads_text else AutoImageProcessor, self.folder, "--detector")
        name = f"AutoModelFor{'ZeroShot' * self.reads_text}ObjectDetection"
        self.model = _loaded(self.folder, name, "--detector")
        self._check_names()

    def _check_names(self) -> None:
        own = {str(name).lower() for name in self.model.config.id2label.values()}
        strange = [name for name in self.names if name.lower() not in own and not self.reads_text]
        if strange:
            some = ", ".join(sorted(own)[:12])
            raise BadInput(f"the detector {self.folder.name} does not know {strange[0]!r}: it knows {some} ...")

    @torch.inference_mode()
    def find(self, image: Image.Image) -> list[Found]:
        """What is in an RGB image, the most certain first."""
        size = [(image.height, image.width)]
        options: dict[str, Any] = {"text": [self.names]} if self.reads_text else {}
        inputs = self.processor(images=image, return_tensors="pt", **options)
        outputs = self.model(**inputs)
        if not self.reads_text:
            told = self.processor.post_process_object_detection(outputs, threshold=LEAST, target_sizes=size)[0]
            names = [str(self.model.config.id2label[int(number)]) for number in told["labels"]]
        else:
            told = self._zero_shot(outputs, inputs, size)
            names = [str(name) for name in told["text_labels"]]
        rows = zip(names, told["scores"].tolist(), told["boxes"].tolist(), strict=True)
        found = [Found(name, score, _share(box, image.size)) for name, score, box in rows]
        wanted = {name.lower() for name in self.names} if not self.reads_text else set()
        found = [thing for thing in found if not wanted or thing.name.lower() in wanted]
        return sorted(found, key=lambda thing: -thing.score)

    def _zero_shot(self, outputs: Any, inputs: Any, size: list[tuple[int, int]]) -> dict[str, Any]:
        options: dict[str, Any] = {"threshold": LEAST, "target_sizes": size, "text_labels": [self.names]}
        if "dino" in self.model.config.model_type:
            options["input_ids"] = inputs["input_ids"]
        told: dict[str, Any] = self.processor.post_process_grounded_object_detection(outputs, **options)[0]
        return told


class Segmenter:
    """Makes masks. `source` is a folder or hub id of a segmenter; `names` are the classes that are the subject.

    Without names a segmenter of things takes the most salient one; one of foreground and background needs none.
    `code`: Python code that comes with the weights may be run.

    Raises:
        BadInput: it can't be loaded, is no segmenter, lacks a class of that name, or has code that may not be run.
    """

    def __init__(self, source: str, names: Sequence[str] = (), code: bool = False) -> None:
        self.folder, kind = model_type_of(source, "--model", SEGMENTERS, code)
        self.names = list(names)
        self.form = _form(kind, self.folder)
        if self.form == "code":
            self._allow(source, code)
            self.model = _run_code(self.folder)
            return
        from transformers import AutoImageProcessor

        self.processor = _prepared(AutoImageProcessor, self.folder, "--model")
        self.model = _loaded(self.folder, f"AutoModelFor{self.form}Segmentation", "--model")
        own = {str(name).lower() for name in self.model.config.id2label.values()}
        strange = [name for name in self.names if name.lower() not in own]
        if strange or (self.form == "Semantic" and not self.names and len(own) != 2):
            asked = f"does not know {strange[0]!r}" if strange else "has many classes: name the subject's with --find"
            raise BadInput(f"the segmenter {self.folder.name} {asked}; it knows {', '.join(sorted(own)[:12])} ...")

    def _allow(self, source: str, code: bool) -> None:
        if not code:
            raise BadInput(
                f"{source} comes with Python code of its own, which would run on this machine with your rights: read "
                "it first, and then pass --allow-code, or give a segmenter of transformers' own classes"
            )
        if self.names:
            raise BadInput(f"{source} tells subject from background and knows no names: leave --find away")

    @torch.inference_mode()
    def mask(self, image: Image.Image) -> np.ndarray | None:
        """The mask of an RGB image, [height, width] float32 in [0, 1], or None if it finds nothing."""
        scale = min(1.0, SIDE / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        if self.form == "code":
            return resized(_foreground(self.model, image).numpy(), size).clip(0, 1)
        outputs = self.model(**self.processor(images=image, return_tensors="pt"))
        if self.form == "Semantic":
            return resized(self._of_classes(outputs.logits[0]), size).clip(0, 1)
        told = self.processor.post_process_instance_segmentation(outputs, threshold=LEAST, target_sizes=[size[::-1]])
        return self._of_things(told[0])

    def _of_classes(self, logits: Tensor) -> np.ndarray:
        names = {number: str(name).lower() for number, name in self.model.config.id2label.items()}
        wanted = [name.lower() for name in self.names] or [names[1]]
        numbers = [int(number) for number, name in names.items() if name in wanted]
        values: np.ndarray = logits.float().softmax(0)[numbers].sum(0).numpy()
        return values

    def _of_things(self, told: dict[str, Any]) -> np.ndarray | None:
        if told["segmentation"] is None:
            return None
        places = torch.as_tensor(told["segmentation"]).numpy()
        labels = self.model.config.id2label
        wanted = {name.lower() for name in self.names}
        things = [thing for thing in told["segments_info"] if (places == thing["id"]).any()]
        named = [thing for thing in things if str(labels[thing["label_id"]]).lower() in wanted]
        if wanted:
            return np.isin(places, [thing["id"] for thing in named]).astype(np.float32) if named else None
        best = max(things, key=lambda thing: thing["score"] * (places == thing["id"]).sum() ** 0.5, default=None)
        return None if best is None else (places == best["id"]).astype(np.float32)


def model_type_of(source: str, option: str, examples: str, code: bool = False) -> tuple[Path, str]:
    """The folder of a network, and the model_type of its config.

    Args:
        source: a folder or a hub id.
        option: the option that names it, and `examples` of what to give, for messages.
        code: fetch Python files too.

    Raises:
        BadInput: it is neither, can't be fetched, or has no config.
    """
    place = Path(source).expanduser()
    if not place.is_dir():
        place = _fetched(source, option, examples, code)
    if not (place / "config.json").is_file():
        raise BadInput(f"{option} {source} has no config.json: give a folder or hub id such as {examples}")
    return place, str(read_json(place / "config.json", dict).get("model_type", ""))


def _fetched(source: str, option: str, examples: str, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise BadInput(f"there is no {source} for {option}: give a folder or hub id such as {examples}")
    try:
        return Path(snapshot_download(source, allow_patterns=[*PATTERNS, *(["*.py"] if code else [])]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")[:200]
        raise BadInput(f"{option} {source} is no folder and can't be fetched from the hub ({reason})") from error


def _prepared(kind: Any, folder: Path, option: str) -> Any:
    try:
        return kind.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{option} {folder}: its preprocessor can't be read ({reason})") from error


def _loaded(folder: Path, name: str, option: str) -> Any:
    import transformers

    try:
        model = load_weights(folder, getattr(transformers, name), torch.float32, trust_remote_code=False)
    except BadInput as fault:
        raise BadInput(f"{option}: {str(fault).replace('fetch the base', 'fetch it')}") from fault
    except ImportError as error:  # the classes for things need scipy
        raise BadInput(f"{option} {folder} needs a package: {' '.join(str(error).split())[:200]}") from error
    return model.eval().requires_grad_(False)


def _form(kind: str, folder: Path) -> str:
    """Which of transformers' classes a segmenter is of, or "code"."""
    from transformers.models.auto import modeling_auto as known

    architectures = " ".join(read_json(folder / "config.json", dict).get("architectures") or ())
    if kind in known.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES:
        return "Semantic"
    if kind in known.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES and kind != "maskformer":
        return "Instance"
    if kind in known.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES and kind not in OTHERS:
        return "Universal"
    if "auto_map" in read_json(folder / "config.json", dict):
        return "code"
    raise BadInput(
        f"{folder} is no segmenter (its model_type is {kind!r}, {architectures or 'without a class'}): give one such "
        f"as {SEGMENTERS}"
    )


def _run_code(folder: Path) -> Any:
    from transformers import AutoModelForImageSegmentation

    try:
        model = load_weights(folder, AutoModelForImageSegmentation, torch.float32, trust_remote_code=True)
    except (BadInput, ImportError, AttributeError) as fault:
        reason = " ".join(str(fault).split())[:200]
        raise BadInput(f"--model {folder}: its own code could not be run ({reason})") from fault
    return model.eval().requires_grad_(False)


def _foreground(model: Any, image: Image.Image) -> Tensor:
    """What a network for foreground and background says, [h, w] in [0, 1]; BiRefNet's last output is its finest."""
    square = image.resize((CODE_SIDE, CODE_SIDE), Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255)
    pixels = ((values - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
    outputs = model(pixels)
    while not isinstance(outputs, Tensor):
        outputs = outputs["logits"] if isinstance(outputs, dict) else outputs[-1]
    return outputs.float().sigmoid().reshape(outputs.shape[-2:])


def _share(box: Sequence[float], size: tuple[int, int]) -> Box:
    left, top, right, bottom = (
        min(max(value / side, 0.0), 1.0) for value, side in zip(box, (*size, *size), strict=True)
    )
    return left, top, right, bottom
