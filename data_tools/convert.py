"""Converts photos with captions between formats, and the settings of other trainers into recipes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from data_tools.items import DataSetOptions, Item, Items, read_items
from data_tools.packed import (
    LARGEST,
    Shape,
    parquet_schema,
    parts,
    samples,
    shape_of,
    write_csv,
    write_parquet,
    write_shard,
)
from data_tools.show import add_run, say, say_json, say_prepared
from data_tools.trainers import kohya, reading
from data_tools.trainers.ai_toolkit import of_ai_toolkit
from data_tools.trainers.carried import CARRIED, LEFT, OFF, Carried, Line, finished, short
from data_tools.trainers.diffusers_flags import of_diffusers
from data_tools.trainers.one_trainer import of_one_trainer
from data_tools.work import Plan, Prepared, Step, Written, carry_out, copied, refuse_place
from finetune.config.load import SCHEMA, SCHEMA_LINE
from finetune.core.errors import BadInput
from finetune.core.files import write_text
from finetune.data.decoding import shown
from finetune.data.sources.kohya_folder import KohyaFolder

RECIPE = "recipe"
FILES = ("captions", "jsonl", "csv", "imagefolder")  # a folder of image files
PACKED = ("parquet", "webdataset")
FORMATS = (*FILES, *PACKED, RECIPE)
TRAIN = "train"  # the split of what is written
MAKERS = {
    reading.KOHYA: kohya.of_flags, reading.DATASET: kohya.of_dataset, reading.ONE_TRAINER: of_one_trainer,
    reading.AI_TOOLKIT: of_ai_toolkit, reading.DIFFUSERS: of_diffusers,
}  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """What `convert_settings` did: `lines` say what became of each setting; `recipe` is its plain data."""

    prepared: Prepared
    trainer: str
    lines: list[Line]
    recipe: dict[str, Any]


def convert(
    source: Path,
    out: Path,
    to: str,
    options: DataSetOptions = DataSetOptions(),  # noqa: B008
    dry_run: bool = False,
    largest: int = LARGEST,
) -> Prepared:
    """Writes the photos and captions of `source` (all that `data.photos` can name) to the new folder `out`.

    `to`: captions (NAME.txt beside each photo), jsonl (metadata.jsonl), csv (metadata.csv), imagefolder (train/ with
    metadata.jsonl), parquet or webdataset (tar shards), in files of at most `largest` bytes of images. The images'
    bytes stay as they are. What a format can't hold is named in the notes.

    Raises:
        BadInput: the format is unknown, there are no images, or `out` can't be written.
    """
    if to not in (*FILES, *PACKED):
        raise BadInput(f"the format {to!r} is unknown: use {', '.join(FORMATS)}")
    refuse_place(source, out)
    found = read_items(source, options)
    good = [item for item in found.items if not item.fault]
    if not good:
        first = found.items[0].fault if found.items else "no images"
        raise BadInput(f"no image of {source} can be used ({first}): give other photos")
    steps = [_step(found, item, to) for item in found.items]
    extra = _extra(good, to, Path(source), largest)
    settings = {"to": to, "source_kind": options.source, "split": options.split}
    return carry_out(Plan("convert", Path(source), steps, settings, _notes(found, to), extra), out, dry_run)


def _step(found: Items, item: Item, to: str) -> Step:
    if item.fault:
        return Step(item.source, "left out", item.fault, label=item.label)
    if to in PACKED:
        return Step(item.source, "packed", label=item.label)
    inside = f"{TRAIN}/" if to == "imagefolder" else ""
    image = Written(f"{inside}{item.name}", item.source, _writer(item), item.size)
    files = [image if item.entry is None else Written(image.name, item.source)]
    if item.entry is not None and to != "imagefolder":
        own = {f"{item.stem}{file.suffix}" for file in item.entry.beside}
        files += [file for file in copied(item.entry)[1:] if file.name not in own]
    listed_anyway = item.row or to == "imagefolder"  # whose readers skip images that have no line
    caption = item.caption if item.caption is not None else "" if listed_anyway else None
    if to == "captions":
        if item.caption is not None:
            text = f"{item.caption}\n"
            files.append(Written(f"{item.stem}.txt", item.source, partial(_write, text), len(text.encode())))
        return Step(item.source, "written", "", tuple(files), label=item.label)
    listed = caption if to in ("jsonl", "imagefolder") else None
    return Step(item.source, "written", "", tuple(files), listed, item.row, label=item.label)


def _writer(item: Item) -> Any:
    def write(path: Path) -> None:
        path.write_bytes(item.read())

    return write


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _extra(good: Sequence[Item], to: str, source: Path, largest: int) -> tuple[Written, ...]:
    """The files that hold all images, or all captions."""
    if to == "csv":
        return (Written("metadata.csv", source, lambda path: write_csv(path, good), 0),)
    if to not in PACKED:
        return ()
    good = samples(good) if to == "webdataset" else good
    found = parts(good, largest)
    sizes = [sum(item.size for item in part) for part in found]
    if to == "webdataset":
        names = [f"{TRAIN}-{number:05d}.tar" for number in range(len(found))]
        shape = shape_of(good)
        writers = [partial(_shard, part, shape) for part in found]
    else:
        schema = parquet_schema(good)
        names = [f"{TRAIN}-{number:05d}-of-{len(found):05d}.parquet" for number in range(len(found))]
        writers = [partial(_parquet, part, schema) for part in found]
    return tuple(Written(*each) for each in zip(names, [source] * len(found), writers, sizes, strict=True))


def _shard(part: Sequence[Item], shape: Shape, path: Path) -> None:
    write_shard(path, part, shape)


def _parquet(part: Sequence[Item], schema: Any, path: Path) -> None:
    write_parquet(path, part, schema)


def _notes(found: Items, to: str) -> tuple[str, ...]:
    notes = list(found.notes)
    if to in (*PACKED, "imagefolder"):
        beside = sum(len(item.entry.companions) for item in found.items if item.entry is not None)
        beside += sum(len(item.entry.further) for item in found.items if item.entry is not None)
        if beside:
            notes.append(
                f"{beside} masks, depth maps and other files of photos are left out: {to} has no place for them"
            )
    columns = sorted({column for item in found.items for column in item.row})
    if to == "captions" and columns:
        notes.append(f"the columns {', '.join(columns)} are left out: captions beside photos have no place for them")
    if to == "webdataset":
        notes += _notes_of_shards([item for item in found.items if not item.fault])
    without = sum(item.caption is None for item in found.items)
    if without:
        notes.append(f"{without} of {len(found.items)} photos have no caption")
    return tuple(notes)


def _notes_of_shards(good: Sequence[Item]) -> list[str]:
    shape = shape_of(good)
    others = sum(not item.name.endswith(f".{shape.ending}") for item in good)
    notes = (
        [f"{others} images of another format are named .{shape.ending}, as all: readers go by content"]
        if others
        else []
    )
    renamed = [item.name for item, new in zip(good, samples(good), strict=True) if item.name != new.name]
    if renamed:
        why = "a sample's name has no dots and is there once"
        notes.append(f"{len(renamed)} samples have other names, such as that of {shown(renamed[0])}: {why}")
    if shape.lost:
        notes.append(f"the columns {', '.join(shape.lost)} are left out: no sample among the first has them")
    return notes


def convert_settings(
    source: Path, out: Path, reg: Path | None = None, base: str | None = None, dry_run: bool = False
) -> Converted:
    """Writes the recipe that another trainer's settings make to the new folder `out`, as recipe.yaml.

    Args:
        source: kohya's folder around "10_sks dog", or a file: kohya's dataset TOML or flags, OneTrainer's JSON,
            ai-toolkit's YAML, or a shell line with flags of kohya's or diffusers' scripts.
        reg: kohya's folder around "1_dog"; of a file, what it names counts.
        base: the base, where the settings name none or another one is wanted.

    Raises:
        BadInput: the settings can't be read, are of no trainer that is known, or make no valid recipe.
    """
    source = Path(source).expanduser()
    trainer, carried = _carried(source, reg)
    if base is not None:
        carried.put("--base", base, "base.source", base)
    if not carried.at("base.source"):
        why = "the settings name no base: give --base, or the recipe trains the small base `tiny`"
        carried.lines.append(Line("base", None, LEFT, "", why))
    recipe = finished(carried, str(source))
    steps = [Step(source, line.action, line.ours or line.why, label=_label(line)) for line in carried.lines]
    text = recipe_text(source, trainer, carried.lines, recipe)
    file = Written("recipe.yaml", source, partial(_write_recipe, text), len(text.encode()))
    plan = Plan("convert", source, steps, {"to": RECIPE, "trainer": trainer}, (), (file,), "settings")
    return Converted(carry_out(plan, out, dry_run), trainer, carried.lines, recipe)


def _carried(source: Path, reg: Path | None) -> tuple[str, Carried]:
    if source.is_dir():
        around, beside = _kohya_folders(source, reg)
        carried = Carried("kohya", source.absolute())
        kohya.of_folders(around, beside, carried)
        return "kohya's folders", carried
    if not source.is_file():
        raise BadInput(f"there is no {source}: give a folder, a data set or a file with settings", path=source)
    if reg is not None:
        raise BadInput(f"--reg is for kohya's folders, but {source} is a file: it names its own class images")
    settings = reading.read_settings(source)
    carried = Carried(settings.trainer.split("'")[0], source.parent.absolute())
    MAKERS[settings.trainer](settings.values, carried)
    return settings.trainer, carried


def _kohya_folders(source: Path, reg: Path | None) -> tuple[Path, Path | None]:
    """The folders around "10_sks dog" and "1_dog": `source`, or its img/ and reg/, as kohya's GUI makes them."""
    inside, beside = source / "img", source / "reg"
    if inside.is_dir() and KohyaFolder.matches(inside):
        own = beside if beside.is_dir() and KohyaFolder.matches(beside) else None
        return inside, reg or own
    return source, reg


def _label(line: Line) -> str:
    return f"{line.key} = {short(line.value)}"


def _write_recipe(text: str, path: Path) -> None:
    write_text(path, text)


def recipe_text(source: Path, trainer: str, lines: Sequence[Line], recipe: dict[str, Any]) -> str:
    """The recipe as YAML, with comments about what of the settings it does not hold."""
    left = [line for line in lines if line.action == LEFT]
    off = sorted({line.key for line in lines if line.action == OFF})
    comments = [f"{SCHEMA_LINE}{SCHEMA}", f"# Made from {trainer}: {source.name}"]
    comments += [
        f"# no counterpart: {line.key} = {short(line.value)}{f' ({line.why})' if line.why else ''}" for line in left
    ]
    if off:
        comments.append(f"# off there: {', '.join(off)}")
    plain = [re.sub(r"[^\x20-\x7e\u00a0-\uffff]", "?", comment) for comment in comments]
    order = ("base", "data", "prior", "method", "objective", "optim", "run", "sample", "export")
    values = {section: recipe[section] for section in order if section in recipe}
    return "\n".join(plain) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `convert`."""
    parser.add_argument(
        "photos", type=Path, metavar="SOURCE", help="photos, a data set, or another trainer's settings"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--to", choices=FORMATS, help="the format; without it settings become a recipe")
    parser.add_argument("--source", default="auto", metavar="KIND", help="what SOURCE is, as data.source of a recipe")
    parser.add_argument("--split", help="of a data set")
    parser.add_argument("--image", metavar="COLUMN", help="a data set's column with images")
    parser.add_argument("--caption", metavar="COLUMN", help="a data set's column with captions")
    parser.add_argument("--reg", type=Path, metavar="FOLDER", help="kohya's class images: the folder around 1_dog")
    parser.add_argument("--base", help="the base of the recipe, where the settings name none")
    add_run(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    chosen = options.to or (RECIPE if _has_settings(options.photos) else None)
    if chosen is None:
        raise BadInput(f"{options.photos} holds photos: say what to write with --to {', '.join(FORMATS)}")
    of_recipe, of_data = ("reg", "base"), ("split", "image", "caption")
    useless = [name for name in (of_data if chosen == RECIPE else of_recipe) if getattr(options, name) is not None]
    if useless:
        raise BadInput(f"--{useless[0]} has no effect with --to {chosen}: leave it out")
    if chosen != RECIPE:
        how = DataSetOptions(options.source, options.split, options.image, options.caption)
        return say_prepared(convert(options.photos, options.out, chosen, how, options.dry_run), options.json)
    return _say(
        convert_settings(options.photos, options.out, options.reg, options.base, options.dry_run), options.json
    )


def _has_settings(source: Path) -> bool:
    """A settings file, or kohya's folders."""
    if source.is_file():
        return source.suffix.lower() in reading.ENDINGS
    if not source.is_dir():
        return False
    around, _ = _kohya_folders(source, None)
    return KohyaFolder.matches(around)


def _say(done: Converted, as_json: bool) -> int:
    if as_json:
        say_json(done.prepared.values() | {"trainer": done.trainer, "recipe": done.recipe})
        return 0
    for action in (CARRIED, LEFT):
        for line in done.lines:
            if line.action == action:
                say(line.text)
    off = sorted({line.key for line in done.lines if line.action == OFF})
    if off:
        say(f"off there, so nothing is lost: {', '.join(off)}")
    return say_prepared_recipe(done.prepared)


def say_prepared_recipe(prepared: Prepared) -> int:
    """Prints what was written and how to go on."""
    say(prepared.sentence)
    if prepared.dry_run:
        say(f"nothing was written (--dry-run): it would be {prepared.out}")
    else:
        say(f"written: {prepared.out}; look at it with: finetune train {prepared.out / 'recipe.yaml'} --dry-run")
    return 0
