"""Networks that describe an image: models of transformers (BLIP-2, Florence-2, Qwen-VL, Llava such as JoyCaption), and
WD14-style taggers through onnxruntime.

No code from a model's folder is run, and weights are read from safetensors only.
"""

from __future__ import annotations

import csv
import importlib
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.core.errors import BadInput, first_line
from finetune.core.reading import read_json, read_utf8

QUESTION = "Describe this image in one or two sentences, as a caption."
FLORENCE_TASK = "<MORE_DETAILED_CAPTION>"
ON_GPU = 8  # images that are described together there; beyond that little is won, and memory is short
FLORENCE, NO_QUESTION = "florence2", ("blip", "blip-2", "git")  # model types; all others take part in a chat
GENERAL, CHARACTER = "0", "4"  # categories in selected_tags.csv; 9 is a rating
SHORTEST_WORD = 4  # characters: shorter tags such as ^_^ keep their underscores
PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.onnx", "*.csv")


@dataclass(frozen=True)
class Asked:
    """What a model is asked. `prompt`: None for the usual one of its kind; `tokens`: the most it may write.

    batch: images that are described together, at most; None: 8 on a GPU, else 1.
    """

    prompt: str | None = None
    tokens: int = 128
    device: str = "auto"
    batch: int | None = None


class Captioner(ABC):
    """Describes images. `name` says which network it is, `batch` how many images it wants at a time."""

    name: str
    batch: int = 1

    @abstractmethod
    def describe(self, image: Image.Image) -> str:
        """The caption of an RGB image; empty if the network says nothing."""

    def describe_all(self, images: Sequence[Image.Image]) -> list[str]:
        """The captions of RGB images, in their order; each as it would be alone."""
        return [self.describe(image) for image in images]


def network_folder(source: str, option: str) -> Path:
    """The folder of a network: a path, or a hub id, which is fetched.

    Raises:
        BadInput: there is no such folder, and it can't be fetched.
    """
    place = Path(source).expanduser()
    if place.exists():
        return place
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise BadInput(f"there is no {source}: give a folder or a hub id (OWNER/NAME) with {option}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")[:200]
        raise BadInput(
            f"{source} is no folder and can't be fetched from the hub ({reason}): give a folder with {option}"
        ) from error


class Model(Captioner):
    """A model of transformers' image-text-to-text classes. It never draws: the same image has the same caption."""

    def __init__(self, source: str, asked: Asked) -> None:
        """
        Raises:
            BadInput: the folder holds no such model.
        """
        import torch
        import transformers

        folder = network_folder(source, "--model")
        kind = str(_config(folder, source).get("model_type"))
        if kind not in transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise BadInput(
                f"{source} is a model of the type {kind!r}, which describes no images: give one such as "
                "Salesforce/blip2-opt-2.7b or Qwen/Qwen2.5-VL-3B-Instruct"
            )
        self.name, self.kind, self.asked = source, kind, asked
        self.device = torch.device(_device(asked.device))
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            self.processor = _processor(folder)
            model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                folder, use_safetensors=True, dtype=dtype
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"the model {source} can't be loaded ({first_line(error)}): give its whole folder"
            ) from error
        self.model: Any = model.to(self.device).eval()
        self.batch = asked.batch or (ON_GPU if self.device.type == "cuda" else 1)
        self._ready_to_pad()

    def _ready_to_pad(self) -> None:
        """Questions of a batch may differ in length, as images have different numbers of tokens: what goes on writing
        behind its input must have it at the end, so that the padding is before it."""
        words = getattr(self.processor, "tokenizer", None)
        if words is None:
            return
        if not self.model.config.is_encoder_decoder:
            words.padding_side = "left"
        if words.pad_token is None:
            words.pad_token = words.eos_token

    def describe(self, image: Image.Image) -> str:
        """As `Captioner.describe`."""
        return self.describe_all([image])[0]

    def describe_all(self, images: Sequence[Image.Image]) -> list[str]:
        """As `Captioner.describe_all`. Images that do not fit into the memory together are described in halves, and
        `batch` is as large as what fits.

        Raises:
            BadInput: not even one fits.
        """
        import torch

        try:
            return self._together(list(images))
        except torch.OutOfMemoryError as error:
            if len(images) == 1:
                raise BadInput(
                    f"{self.name} needs more memory for one image than {self.device} has: give a smaller model, "
                    "or --device cpu"
                ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch = half = (len(images) + 1) // 2
        return [*self.describe_all(images[:half]), *self.describe_all(images[half:])]

    def _together(self, images: list[Image.Image]) -> list[str]:
        import torch

        inputs = self._inputs(images).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with torch.no_grad():
            written = self.model.generate(**inputs, max_new_tokens=self.asked.tokens, do_sample=False, num_beams=1)
        return [" ".join(text.split()) for text in self._texts(written, inputs, images)]

    def _inputs(self, images: list[Image.Image]) -> Any:
        prompt, count = self.asked.prompt, len(images)
        together: dict[str, Any] = {"return_tensors": "pt", **({"padding": True} if count > 1 else {})}
        if self.kind == FLORENCE:
            return self.processor(text=[prompt or FLORENCE_TASK] * count, images=images, **together)
        if self.kind in NO_QUESTION:
            words = prompt if prompt else "" if self.kind == "blip-2" else None
            return self.processor(images=images, **({} if words is None else {"text": [words] * count}), **together)
        question = prompt or QUESTION
        if getattr(self.processor, "chat_template", None):
            return self.processor.apply_chat_template(
                [_message(image, question) for image in images],
                add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=together,
            )  # fmt: skip
        token = getattr(self.processor, "image_token", "<image>")
        text = f"USER: {getattr(token, 'content', token)}\n{question} ASSISTANT:"  # Llava's form
        return self.processor(text=[text] * count, images=images, **together)

    def _texts(self, written: Any, inputs: Any, images: list[Image.Image]) -> list[str]:
        """What was written of each image, without the question."""
        if self.kind == FLORENCE:
            return [self._florence_text(ids, image) for ids, image in zip(written, images, strict=True)]
        asked = inputs["input_ids"] if "input_ids" in inputs else written[:, :0]
        count = asked.shape[1]
        echoed = written.shape[1] >= count and bool((written[:, :count] == asked).all())
        answers = written[:, count if echoed else 0 :]
        return [str(text) for text in self.processor.batch_decode(answers, skip_special_tokens=True)]

    def _florence_text(self, ids: Any, image: Image.Image) -> str:
        task = self.asked.prompt or FLORENCE_TASK
        ids = ids[ids != self.processor.tokenizer.pad_token_id]  # behind what ends before the others of its batch
        raw = self.processor.batch_decode(ids[None], skip_special_tokens=False)[0]
        return str(self.processor.post_process_generation(raw, task=task, image_size=image.size).get(task, ""))


def _message(image: Image.Image, question: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def _processor(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoProcessor.from_pretrained(folder)
    except ImportError as error:  # of Qwen-VL's processor for videos, which needs torchvision
        if "torchvision" not in str(error).lower():
            raise
        return ImagesOnly(folder)


class ImagesOnly:
    """The processor of a model that also takes videos (Qwen-VL), without that part, which needs torchvision."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.images: Any = transformers.AutoImageProcessor.from_pretrained(folder)
        self.words: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.image_id = int(_config(folder, str(folder))["image_token_id"])
        own = folder / "chat_template.jinja"
        self.chat_template = read_utf8(own) if own.is_file() else self.words.chat_template

    def apply_chat_template(self, chats: list[list[dict[str, Any]]], **_: Any) -> Any:
        """Questions with one image each, as the whole processor gives them; shorter ones are padded in front."""
        import torch
        from transformers import BatchFeature

        images = [part["image"] for chat in chats for part in chat[0]["content"] if part["type"] == "image"]
        pixels = self.images(images=images, return_tensors="pt")
        counts = pixels["image_grid_thw"].prod(-1) // self.images.merge_size**2
        rows = [self._ids(chat, int(count)) for chat, count in zip(chats, counts, strict=True)]
        longest, pad = max(map(len, rows)), self.words.pad_token_id or 0
        whole = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        told = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        words = {"input_ids": whole, "attention_mask": told, "mm_token_type_ids": (whole == self.image_id).int()}
        return BatchFeature({**words, **pixels})

    def _ids(self, chat: list[dict[str, Any]], count: int) -> list[int]:
        """The ids of a question whose image has `count` tokens."""
        text = self.words.apply_chat_template(
            chat, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
        )
        ids: list[int] = self.words(text)["input_ids"]
        place = ids.index(self.image_id)
        return [*ids[:place], *[self.image_id] * count, *ids[place + 1 :]]

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """The texts of ids."""
        found: list[str] = self.words.batch_decode(ids, **options)
        return found


def _config(folder: Path, source: str) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise BadInput(f"{source} holds no config.json: give a model's folder, or its hub id, with --model")
    return read_json(file, dict)


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    from finetune.core.devices import best_device

    return str(best_device())


class Tagger(Captioner):
    """A WD14-style tagger: model.onnx, and selected_tags.csv with tag_id, name and category.

    Its input is [1, side, side, 3], BGR from 0 to 255, the image on white (kohya-ss/sd-scripts,
    finetune/tag_images_by_wd14_tagger.py).
    """

    def __init__(self, source: str, threshold: float) -> None:
        """`threshold`: of the probability with which a tag counts.

        Raises:
            BadInput: onnxruntime is not installed, or the folder holds no tagger.
        """
        runtime = _onnxruntime()
        folder = network_folder(source, "--tagger")
        missing = [name for name in ("model.onnx", "selected_tags.csv") if not (folder / name).is_file()]
        if missing:
            raise BadInput(f"{source} holds no {' and no '.join(missing)}: give the folder of a tagger with --tagger")
        self.name, self.threshold = source, threshold
        self.tags = read_tags(folder / "selected_tags.csv")
        try:
            self.session = runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
        except MemoryError:
            raise
        except Exception as error:  # of onnxruntime, which has classes of its own for each fault
            raise BadInput(f"{folder / 'model.onnx'} can't be loaded ({first_line(error)}): copy it again") from error
        put = self.session.get_inputs()[0]
        self.put, self.side = put.name, int(put.shape[1]) if isinstance(put.shape[1], int) else 448

    def describe(self, image: Image.Image) -> str:
        """As `Captioner.describe`: the tags with commas between them, the most probable first."""
        chances = self.session.run(None, {self.put: tagger_input(image, self.side)})[0][0]
        return ", ".join(chosen_tags(chances, self.tags, self.threshold))


def _onnxruntime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise BadInput(
            "a tagger needs the package onnxruntime, which is not installed: pip install 'finetune-diffusion[tagger]'"
        ) from error


def tagger_input(image: Image.Image, side: int) -> np.ndarray:
    """The image in the middle of a white square, [1, side, side, 3] float32, BGR from 0 to 255."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    resized = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.float32)[None, :, :, ::-1].copy()


def read_tags(file: Path) -> list[tuple[str, str]]:
    """(tag, category) in the order of the tagger's output.

    Raises:
        BadInput: the file has no columns name and category.
    """
    rows = list(csv.DictReader(io.StringIO(read_utf8(file))))
    if not rows or not {"name", "category"} <= rows[0].keys():
        raise BadInput(f"{file} must have the columns name and category: give the tagger's own file", path=file)
    return [(_plain(row["name"]), row["category"]) for row in rows]


def _plain(tag: str) -> str:
    return tag.replace("_", " ") if len(tag) >= SHORTEST_WORD else tag


def chosen_tags(chances: Sequence[float], tags: Sequence[tuple[str, str]], threshold: float) -> list[str]:
    """The tags of at least the threshold, the most probable first; characters before general tags, no ratings."""
    found = []
    for chance, (name, category) in zip(chances, tags, strict=True):
        if category in (GENERAL, CHARACTER) and chance >= threshold:
            found.append((category != CHARACTER, -float(chance), name))
    return [name for _, _, name in sorted(found)]
