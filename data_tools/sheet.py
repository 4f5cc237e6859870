"""Writes a contact sheet and a page of a set: every photo with its verdict, findings and caption, the worst first."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_tools.check import File, Findings, check_for
from data_tools.for_base import add_base, add_detector
from data_tools.geometry import WHOLE, Cut, save
from data_tools.show import add_folders, say_prepared
from data_tools.work import Plan, Prepared, Step, Writer, Written, carry_out, refuse_place
from finetune.data.decoding import open_image, shown

CELL, TEXT, GAP = 256, 34, 8  # pixels: a photo, the lines below it, and between two
COLUMNS = 6
MOST = 300  # photos on the contact sheet; the page has all
THUMBS = "thumbs"
COLOURS = {"leave out": "#c62828", "look at it": "#ef8c00", "good": "#2e7d32"}

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
.set { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }
figure { margin: 0; border-top: 5px solid; background: #f6f6f6; padding: .6rem; overflow-wrap: anywhere; }
img { max-width: 100%; display: block; margin: auto; } ul { padding-left: 1.1rem; margin: .3rem 0; }
.note { color: #666; } .caption { font-style: italic; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } figure { background: #262626; } }
"""


def sheet(findings: Findings, out: Path, dry_run: bool = False) -> Prepared:
    """Writes `out`/index.html, `out`/sheet.png and small images, from what `check` found of a set.

    Raises:
        BadInput: `out` can't be written.
    """
    steps = [_step(number, file) for number, file in enumerate(findings.worst_first)]
    source = findings.files[0].path
    extra = (
        Written("index.html", source, _page_writer(findings)),
        Written("sheet.png", source, _grid_writer(findings)),
    )
    shown_on_sheet = min(MOST, len(steps))
    notes = (f"sheet.png shows the worst {shown_on_sheet} of {len(steps)}",) if shown_on_sheet < len(steps) else ()
    return carry_out(Plan("sheet", findings.folder, steps, {}, notes, extra), out, dry_run)


def _step(number: int, file: File) -> Step:
    why = "; ".join(file.problems)
    if file.size is None:
        return Step(file.path, file.verdict, why)
    thumb = Written(_thumb_name(number), file.path, _thumb_writer(file))
    return Step(file.path, file.verdict, why, (thumb,), quiet=True)


def _thumb_name(number: int) -> str:
    return f"{THUMBS}/{number:05d}.jpg"


def _thumb_writer(file: File) -> Writer:
    return lambda path: save(_thumb(file), path, "jpg")


def _thumb(file: File) -> Image.Image:
    assert file.size is not None
    scale = min(1.0, CELL / max(file.size))
    width, height = (max(1, round(side * scale)) for side in file.size)
    return Cut(WHOLE, (width, height)).of(open_image(file.path), Image.Resampling.BOX)


def _page_writer(findings: Findings) -> Writer:
    def write(path: Path) -> None:
        path.write_text(page(findings), encoding="utf-8", newline="\n")

    return write


def page(findings: Findings) -> str:
    """The page as HTML. It loads nothing from elsewhere."""
    figures = "\n".join(_figure(number, file) for number, file in enumerate(findings.worst_first))
    name = _told(findings.folder.name)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style>\n"
        f"<h1>{name}</h1>\n<p>{len(findings.files)} photos: {escape(findings.verdict.replace(' above', ''))}.</p>\n"
        f"{_list(findings.problems, '')}{_list(findings.notes, 'note')}"
        f'<div class="set">\n{figures}\n</div></html>\n'
    )


def _told(text: str) -> str:
    """A text for the page; a file's name may be no UTF-8."""
    return escape(shown(text))


def _figure(number: int, file: File) -> str:
    image = f'<img src="{_thumb_name(number)}" alt="" loading="lazy">' if file.size else ""
    size = f" {file.size[0]}x{file.size[1]}" if file.size else ""
    caption = f'<p class="caption">{escape(file.caption)}</p>' if file.caption else ""
    return (
        f'<figure style="border-color: {COLOURS[file.verdict]}">{image}<figcaption><b>{_told(file.name)}</b>{size}: '
        f"{file.verdict}{_list(file.problems, '')}{_list(file.notes, 'note')}{caption}</figcaption></figure>"
    )


def _list(texts: Sequence[str], kind: str) -> str:
    items = "".join(f"<li>{_told(text)}</li>" for text in texts)
    return f'<ul class="{kind}">{items}</ul>\n' if items else ""


def _grid_writer(findings: Findings) -> Writer:
    return lambda path: save(grid(findings.worst_first[:MOST]), path, "png")


def grid(files: Sequence[File]) -> Image.Image:
    """The contact sheet, RGB: each photo in a frame of its verdict's colour, with its name and first problem."""
    columns = min(COLUMNS, len(files))
    rows = -(-len(files) // columns)
    cell = (CELL + 2 * GAP, CELL + TEXT + 2 * GAP)
    made = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    for number, file in enumerate(files):
        made.paste(_cell(file, cell), (number % columns * cell[0], number // columns * cell[1]))
    return made


def _cell(file: File, size: tuple[int, int]) -> Image.Image:
    cell = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(cell)
    draw.rectangle((2, 2, size[0] - 3, size[1] - 3), outline=COLOURS[file.verdict], width=4)
    if file.size is not None:
        thumb = _thumb(file)
        cell.paste(thumb, ((size[0] - thumb.width) // 2, GAP + (CELL - thumb.height) // 2))
    font = ImageFont.load_default(13)
    for line, text in enumerate((file.name, "; ".join(file.problems) or "good")):
        draw.text((GAP + 2, GAP + CELL + 1 + 16 * line), _fitting(text, font), fill="black", font=font)
    return cell


def _fitting(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The text, cut to the width of a cell; signs that the font lacks become ?."""
    plain = text.encode("ascii", "replace").decode()
    if font.getlength(plain) <= CELL:
        return plain
    while plain and font.getlength(f"{plain}...") > CELL:
        plain = plain[:-1]
    return f"{plain}..."


def options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `sheet`."""
    add_folders(parser)
    add_base(parser)
    add_detector(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    refuse_place(options.photos, options.out)
    return say_prepared(sheet(check_for(options), options.out, options.dry_run), options.json)
