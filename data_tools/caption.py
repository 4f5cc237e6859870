"""Writes captions by models, taggers, templates and replacements, beside the originals, in a new folder."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from data_tools.captioners import Asked, Captioner, Model, Tagger, network_folder
from data_tools.photo_set import Entry, PhotoSet, read_set
from data_tools.show import add_folders, say, say_prepared, whole_number
from data_tools.work import Plan, Prepared, Step, Written, carry_out, kept, refuse_place, with_caption
from finetune.core.errors import BadInput
from finetune.core.events import phase
from finetune.core.files import append_line, cache_dir, sha256
from finetune.core.reading import json_lines
from finetune.data.decoding import BadImage, open_image
from finetune.data.mixes import OWN, TEMPLATES
from finetune.data.settings import MIX_NAME
from finetune.families.digests import file_hashes

SYNTHETIC, ORIGINAL = "synthetic", "original"  # names of captions
NOTHING = "not captioned"  # a photo that stays as it is, and why is told
DRAFTS = 5  # photos that a dry run describes
MOST = 1_000_000_000  # bytes of a file with captions that are known
PLACES = ("{caption}", "{name}", "{token}", "{noun}")  # the last two are filled in by training


@dataclass(frozen=True)
class Wording:
    """How a caption is made of what a network wrote, or of the photo's own caption.

    replace: (old, new), in this order; `regex`: the old ones are regular expressions. template: a text with {caption},
    and perhaps {name}, the file's name; empty for none.
    """

    replace: tuple[tuple[str, str], ...] = ()
    regex: bool = False
    template: str = ""

    def apply(self, text: str, name: str) -> str:
        """Returns the caption of the photo `name`, in one line."""
        for old, new in self.replace:
            text = re.sub(old, new, text) if self.regex else text.replace(old, new)
        if self.template:
            values = {"{caption}": text, "{name}": name}  # in one go: the caption itself may hold {name}
            text = re.sub(r"\{caption\}|\{name\}", lambda place: values[place[0]], self.template)
        return " ".join(text.split())


@dataclass(frozen=True)
class CaptionRules:
    """What is written where.

    called: the name of the new captions: files PHOTO.NAME.txt (or a column of metadata.jsonl) beside the photo's own
    caption, for `data.caption_mix`. With "own" they take the place of the own ones, which stay as PHOTO.original.txt.
    share: with "own", the share of the photos that get a new caption; chosen by the SHA-256 of their files.
    """

    called: str = SYNTHETIC
    wording: Wording = Wording()
    share: float = 1.0


def caption(
    source: Path, out: Path, rules: CaptionRules, captioner: Captioner | None = None, dry_run: bool = False
) -> Prepared:
    """Copies the photos of `source` to the new folder `out` with further captions, or new ones.

    Without a `captioner` the photos' own captions are worded anew. What a network wrote is kept in the cache, so that
    an interrupted command goes on. A dry run describes only the first photos.

    Raises:
        BadInput: a rule can't be used or changes nothing, or `out` can't be written.
    """
    _refuse(rules, captioner)
    refuse_place(source, out)
    photos = read_set(source)
    wanted = captioner.batch if captioner else 0
    found = _found(photos, _chosen(photos, rules.share), captioner, dry_run)
    steps = [_step(photos, entry, rules, found) for entry in photos.entries]
    if all(step.action in ("copied", "left out", NOTHING) for step in steps):
        raise BadInput(f"this changes no caption of {source}: {_why_nothing(photos, rules, captioner)}")
    settings = asdict(rules) | {"network": captioner.name if captioner else None}
    notes = photos.notes
    if captioner and captioner.batch < wanted:
        notes += (f"{wanted} images did not fit into the memory together: {captioner.batch} at a time did",)
    return carry_out(Plan("caption", Path(source), steps, settings, notes), out, dry_run)


def _why_nothing(photos: PhotoSet, rules: CaptionRules, captioner: Captioner | None) -> str:
    if captioner is not None:
        return "the network wrote nothing, or no photo can be read"
    if not any(entry.caption for entry in photos.entries):
        return "no photo has one, so there is nothing to put into {caption} or to replace"
    olds = ", ".join(repr(old) for old, _ in rules.wording.replace)
    return f"{olds} of --replace is in none of them" if olds else "the template makes the same ones"


def _refuse(rules: CaptionRules, captioner: Captioner | None) -> None:
    if rules.called in (TEMPLATES, ORIGINAL) or not MIX_NAME.fullmatch(rules.called):
        raise BadInput(f"--as {rules.called!r} can't name captions: use letters, digits, _ and -, or own")
    if not 0 < rules.share <= 1:
        raise BadInput(f"--share is {rules.share:g}: give a share of the photos, above 0 and at most 1")
    if rules.share < 1 and rules.called != OWN:
        raise BadInput(
            "--share chooses photos whose own caption is replaced, with --as own: leave it out, since "
            "data.caption_mix of a recipe draws by share in each step"
        )
    if rules.wording.template and "{caption}" not in rules.wording.template and captioner is not None:
        raise BadInput("--template has no {caption}, so what the network writes is lost: write {caption} into it")
    _refuse_wording(rules.wording)


def _refuse_wording(wording: Wording) -> None:
    unknown = [word for word in re.findall(r"\{\w+\}", wording.template) if word not in PLACES]
    if unknown:
        raise BadInput(f"--template has {unknown[0]}, which is not a known placeholder: known are {', '.join(PLACES)}")
    if any(not old for old, _ in wording.replace):
        raise BadInput("--replace '' would write between all letters: give the words that are replaced")
    if wording.regex:
        for old, new in wording.replace:
            try:
                re.sub(old, new, "")
            except (re.error, IndexError) as error:
                raise BadInput(f"--replace {old!r} is no regular expression ({error}): correct it") from error


def _chosen(photos: PhotoSet, share: float) -> set[str]:
    """The names of the photos that get a new caption."""
    names = [entry.name for entry in photos.entries]
    if share >= 1:
        return set(names)
    digests = {entry.name: sha256(entry.path) for entry in photos.entries if entry.path.is_file()}
    ordered = sorted(digests, key=lambda name: (digests[name], name))
    return set(ordered[: max(1, round(share * len(names)))])


def _found(photos: PhotoSet, chosen: set[str], captioner: Captioner | None, dry_run: bool) -> Found:
    """What the chosen photos' new captions are made of."""
    entries = [entry for entry in photos.entries if entry.name in chosen]
    if captioner is None:
        return Found({entry.name: entry.caption or "" for entry in entries}, {}, False)
    known = Known(captioner)
    texts: dict[str, str] = {}
    faults: dict[str, str] = {}
    todo = entries[: DRAFTS if dry_run else None]
    with phase("Captions", len(entries), "photos") as advance:
        while todo:
            group, todo = todo[: captioner.batch], todo[captioner.batch :]  # it may shrink meanwhile
            found = known.read(group)
            texts |= found.texts
            faults |= found.faults
            advance(len(group), "")
    return Found(texts, faults, True)


class Known:
    """What a network wrote before, by the photos' content: a file of lines in the cache, one for each network and
    question."""

    def __init__(self, captioner: Captioner) -> None:
        self.captioner = captioner
        self.file = cache_dir() / "captions" / f"{_key(captioner)[:32]}.jsonl"
        self.texts: dict[str, str] = {}
        if self.file.is_file():
            rows = (row for _, row in json_lines(self.file, MOST))
            self.texts = {str(row["photo"]): str(row["text"]) for row in rows if {"photo", "text"} <= row.keys()}

    def read(self, entries: Sequence[Entry]) -> Found:
        """The network's captions of photos; those it does not know yet are described together."""
        faults: dict[str, str] = {}
        digests: dict[str, str] = {}
        new: dict[str, Image.Image] = {}
        for entry in entries:
            try:
                image = open_image(entry.path).convert("RGB")
            except BadImage as fault:
                faults[entry.name] = fault.reason
                continue
            digest = digests[entry.name] = sha256(entry.path)
            if digest not in self.texts:
                new[digest] = image
        if new:
            self._keep(dict(zip(new, self.captioner.describe_all(list(new.values())), strict=True)))
        return Found({name: self.texts[digest] for name, digest in digests.items()}, faults, True)

    def _keep(self, texts: Mapping[str, str]) -> None:
        self.texts |= texts
        self.file.parent.mkdir(parents=True, exist_ok=True)
        for digest, text in texts.items():
            append_line(self.file, json.dumps({"photo": digest, "text": text}, ensure_ascii=True))


def _key(captioner: Captioner) -> str:
    """A hash of the network's files and of what it is asked."""
    asked: Mapping[str, Any] = {}
    if isinstance(captioner, Model):
        asked = {"prompt": captioner.asked.prompt, "tokens": captioner.asked.tokens}
    if isinstance(captioner, Tagger):
        asked = {"threshold": captioner.threshold}
    folder = network_folder(captioner.name, "--model")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    hashes = file_hashes(files)
    told = [[file.relative_to(folder).as_posix(), hashes[file]] for file in files]
    return hashlib.sha256(json.dumps([told, asked], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Found:
    """What new captions are made of, by the photo's name, and why a photo can't be described."""

    texts: Mapping[str, str]
    faults: Mapping[str, str]
    by_network: bool


def _step(photos: PhotoSet, entry: Entry, rules: CaptionRules, found: Found) -> Step:
    step = kept(photos, entry)
    if not step.files:
        return step
    if entry.name in found.faults:
        return changed(step, action=NOTHING, why=f"not described: {found.faults[entry.name]}")
    if entry.name not in found.texts:
        return step
    if found.by_network and not found.texts[entry.name]:
        return changed(step, action=NOTHING, why="the network wrote nothing")
    if not found.texts[entry.name] and "{caption}" in rules.wording.template:
        return changed(step, action=NOTHING, why="it has no caption for {caption}")
    text = rules.wording.apply(found.texts[entry.name], entry.name)
    if rules.called == OWN and text == (entry.caption or ""):
        return step
    if not text:
        return changed(step, action=NOTHING, why="nothing was written")
    if rules.called == OWN:
        before = entry.caption
        step = with_caption(_listed(step, photos), entry, text)
        if before:
            step = further_caption(step, entry, ORIGINAL, before)
        return changed(step, action="captioned anew", why=text)
    return changed(further_caption(step, entry, rules.called, text), action="captioned", why=text)


def _listed(step: Step, photos: PhotoSet) -> Step:
    """A photo without a caption in a set with a list gets its caption there."""
    return changed(step, caption="") if photos.listed and step.caption is None and not _has_text(step) else step


def _has_text(step: Step) -> bool:
    return any(PurePosixPath(file.name).with_suffix("") == PurePosixPath(step.target).with_suffix("")
               for file in step.files[1:])  # fmt: skip


def further_caption(step: Step, entry: Entry, called: str, text: str) -> Step:
    """The step with a further caption of that name: a column of the list, or a file PHOTO.NAME.txt.

    Raises:
        BadInput: the photo has such a caption already.
    """
    if step.caption is not None:
        if called in step.row:
            raise BadInput(f"{entry.name} has a caption {called!r} already: give another name with --as")
        return changed(step, row={**step.row, called: text})
    name = f"{PurePosixPath(step.target).stem}.{called}.txt"
    if any(file.name.lower() == name.lower() for file in step.files):
        raise BadInput(f"{entry.name} has a caption {called!r} already ({name}): give another name with --as")

    def write(path: Path) -> None:
        path.write_text(f"{text}\n", encoding="utf-8", newline="\n")

    return changed(step, files=(*step.files, Written(name, entry.path, write, len(text.encode()) + 1)))


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `caption`."""
    add_folders(parser)
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--model", metavar="ID", help="a model of transformers for images: folder or hub id")
    network.add_argument("--tagger", metavar="ID", help="a WD14-style tagger (model.onnx): folder or hub id")
    parser.add_argument("--prompt", help="what the model is asked; of Florence-2 a task such as '<CAPTION>'")
    parser.add_argument(
        "--max-tokens", type=whole_number(1, "tokens"), default=128, metavar="N", help="length of a caption"
    )
    parser.add_argument(
        "--batch-size", type=whole_number(1, "images"), metavar="N",
        help="images that the model describes together (default: 8 on a GPU, else 1)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="for the model, such as cpu or cuda (default: the best one)")
    parser.add_argument(
        "--threshold", type=float, default=None, metavar="P", help="tags of at least this probability are kept (0.35)"
    )
    parser.add_argument("--template", default="", help="a text with {caption}, such as 'sks, {caption}'")
    parser.add_argument("--replace", nargs=2, action="append", default=[], metavar=("OLD", "NEW"), help="change words")
    parser.add_argument("--regex", action="store_true", help="OLD is a regular expression")
    parser.add_argument("--as", dest="called", metavar="NAME", help="write PHOTO.NAME.txt; own: replace the captions")
    parser.add_argument(
        "--share", type=float, default=1.0, metavar="S", help="with --as own: only for this share of the photos"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    wording = Wording(tuple((old, new) for old, new in options.replace), options.regex, options.template)
    by_network = options.model is not None or options.tagger is not None
    rules = CaptionRules(options.called or (SYNTHETIC if by_network else OWN), wording, options.share)
    _refuse_useless(options, by_network)
    _refuse(rules, None)
    refuse_place(options.photos, options.out)  # before a model is loaded
    done = caption(options.photos, options.out, rules, _captioner(options), options.dry_run)
    code = say_prepared(done, options.json)
    if not options.json and rules.called != OWN:
        say(f"a recipe draws both, half and half, with data.caption_mix='{{own: 0.5, {rules.called}: 0.5}}'")
    return code


def _refuse_useless(options: argparse.Namespace, by_network: bool) -> None:
    if not by_network and not options.template and not options.replace:
        raise BadInput("this changes no caption: give --model, --tagger, --template or --replace")
    if options.prompt is not None and options.model is None:
        raise BadInput("--prompt has no effect without --model: leave it out")
    if options.batch_size is not None and options.model is None:
        raise BadInput("--batch-size has no effect without --model: leave it out")
    if options.threshold is not None and options.tagger is None:
        raise BadInput("--threshold has no effect without --tagger: leave it out")
    if options.threshold is not None and not 0 < options.threshold < 1:
        raise BadInput(f"--threshold is {options.threshold:g}: give a probability between 0 and 1")
    if options.regex and not options.replace:
        raise BadInput("--regex has no effect without --replace: leave it out")


def _captioner(options: argparse.Namespace) -> Captioner | None:
    if options.model is not None:
        return Model(options.model, Asked(options.prompt, options.max_tokens, options.device, options.batch_size))
    if options.tagger is not None:
        return Tagger(options.tagger, 0.35 if options.threshold is None else options.threshold)
    return None
