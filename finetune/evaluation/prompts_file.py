"""The prompts of an evaluation: those of the package, a file of one's own, or the table of a folder with images."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from finetune.core.errors import BadInput
from finetune.core.files import leads_out
from finetune.core.reading import list_items, read_utf8
from finetune.data.captions import without_trigger
from finetune.evaluation.base import GROUPS, Kind, Prompt

TABLE = "prompts.csv"
COLUMNS = ("file", "prompt", "group")
CLASS_PROMPT = "a photo of a {noun}"
PLACEHOLDER = re.compile(r"\{\s*[\w-]*\s*\}")
BOTH = "{token} {noun}"
MOST = 10_000  # prompts in a file, rows in a table: more is a slip


@dataclass(frozen=True)
class Called:
    """The words of one subject: its token and class noun, or the words that call a style.

    `alone`: it was trained with the token in place of the noun, as new words are, so prompts have no noun behind it.
    """

    token: str = ""
    noun: str = ""
    style: str = ""
    alone: bool = False

    @property
    def words(self) -> str:
        """What calls it in a prompt."""
        return self.style or (self.token if self.alone else f"{self.token} {self.noun}".strip())

    def prompt(self, template: str) -> Prompt:
        """A template with its words, and the same without the token or the style's words.

        Raises:
            BadInput: the template has another placeholder, or one whose word is not known.
        """
        words = {"{token}": self.token, "{noun}": self.noun, "{style}": self.style}
        for name, word in words.items():
            if name in template and not word:
                raise BadInput(f"the prompt {template!r} has {name}, which is not known here: write the word itself")
        text = template.replace(BOTH, "{token}") if self.alone else template
        for name, word in words.items():
            text = text.replace(name, word)
        left = PLACEHOLDER.search(text)
        if left:
            raise BadInput(f"the prompt {template!r} has {left[0]!r}: write {{token}}, {{noun}} or {{style}}")
        return Prompt(text, self.plain(text))

    def plain(self, text: str) -> str:
        """A prompt without the style's words or the token. The noun stands in place of a token without one."""
        if self.alone and self.noun:
            token, noun = re.escape(self.token), re.escape(self.noun)
            return re.sub(f"{token}( {noun})?", lambda _: self.noun, text, flags=re.IGNORECASE)
        for words in filter(None, (self.style, self.token)):
            shorter = without_trigger(text, words, any_case=True)
            if shorter is not None:
                return shorter
        return text

    @property
    def of_class(self) -> list[Prompt]:
        """The prompt of the class alone; none for a style."""
        if self.style or not self.noun:
            return []
        text = CLASS_PROMPT.format(noun=self.noun)
        return [Prompt(text, text, "class")]


def prompts_for(called: Called) -> Kind:
    """What the prompts should do with it: a style, a living thing, or another thing."""
    if called.style:
        return "style"
    last = called.noun.lower().split()[-1:]
    return "live" if last and last[0] in live_nouns() else "object"


def live_nouns() -> set[str]:
    """The class nouns of people and animals that are known here."""
    return {word for line in list_items(_packaged("live-nouns")) for word in line.split()}


def templates(file: Path | None, kind: Kind) -> list[str]:
    """The prompts of a file, or without one those of the package for this kind.

    Raises:
        BadInput: the file is not there, is no text, or holds no prompts.
    """
    if file is None:
        return list_items(_packaged(kind))
    if not file.is_file():
        raise BadInput(f"there is no file {file}: give --prompts a text file with one prompt on each line")
    found = list_items(read_utf8(file))
    if not 0 < len(found) <= MOST:
        raise BadInput(f"{file} has {len(found):,} prompts: give a file with one prompt on each line")
    return list(dict.fromkeys(found))


def table_of(folder: Path, called: Called | None) -> tuple[list[Prompt], list[list[Path]]]:
    """The prompts of a folder's table, and the image files of each.

    The table is FOLDER/prompts.csv with the columns `file` and `prompt`, and perhaps `group`: "subject" (if empty), or
    "class" for images of the class alone.

    Raises:
        BadInput: there is no folder or no table, or the table names files that are not there.
    """
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}: give --images a folder of images with a {TABLE}")
    if not (folder / TABLE).is_file():
        raise BadInput(f"{folder} has no {TABLE}: write one with the columns file,prompt and a row for each image")
    found: dict[tuple[str, str], list[Path]] = {}
    for number, (name, text, group) in enumerate(_rows(folder / TABLE), 2):
        file = folder / name
        if not file.is_file():
            raise BadInput(f"{folder / TABLE} line {number}: there is no file {name!r} in {folder}: correct the row")
        if leads_out(file, folder):  # the page shows the images, and is passed on
            raise BadInput(f"{folder / TABLE} line {number}: {name!r} leads out of {folder}: copy the image into it")
        found.setdefault((text, group), []).append(file)
    prompts = [_of_table(text, group, called) for text, group in found]
    return prompts, list(found.values())


def _of_table(text: str, group: str, called: Called | None) -> Prompt:
    plain = called.plain(text) if called else text
    return Prompt(text, plain, "class" if group == "class" else "subject")


def _rows(table: Path) -> list[tuple[str, str, str]]:
    try:
        reader = csv.DictReader(io.StringIO(read_utf8(table)), strict=True)
        names = [name.strip().lower() for name in reader.fieldnames or []]
        if not {"file", "prompt"} <= set(names) <= set(COLUMNS):
            raise BadInput(f"{table} has the columns {','.join(names)[:80]!r}: its first line must be file,prompt")
        reader.fieldnames = names
        rows = [tuple((row.get(name) or "").strip() for name in COLUMNS) for row in reader]
    except csv.Error as error:
        raise BadInput(f"{table} can't be read as a table ({error}): save it as CSV with commas") from error
    for number, (name, text, group) in enumerate(rows, 2):
        if not name or not text or group not in ("", *GROUPS):
            raise BadInput(f"{table} line {number} has no file, no prompt, or an unknown group: correct it")
    if not 0 < len(rows) <= MOST:
        raise BadInput(f"{table} has {len(rows):,} rows: give a row for each image")
    return [(name, text, group or "subject") for name, text, group in rows]


def _packaged(name: str) -> str:
    return files("finetune.evaluation").joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8")
