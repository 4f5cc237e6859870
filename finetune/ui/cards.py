"""A run's model card as a page of its own: what the hub would show."""

from __future__ import annotations

import html
from pathlib import Path

from finetune.core.errors import BadInput
from finetune.core.files import leads_out
from finetune.core.reading import read_utf8
from finetune.report.look import STYLE
from finetune.ui.plain_words import without_places

LARGEST_CARD = 1_000_000  # bytes


def card_page(run: Path) -> str:
    """The HTML of RUN/exports/README.md. What the card holds as HTML is shown as text.

    Raises:
        BadInput: there is no card.
    """
    from markdown_it import MarkdownIt

    file = run / "exports" / "README.md"
    if not file.is_file() or leads_out(file, run):
        raise BadInput("the run has no model card yet: it is written with the files, at the end")
    text = without_places(read_utf8(file, LARGEST_CARD))
    front, rest = _parts(text)
    shown = MarkdownIt("commonmark", {"html": False}).enable("table").render(rest.replace("<Gallery />", ""))
    facts = f"<details><summary>What the hub reads</summary><pre>{html.escape(front)}</pre></details>" if front else ""
    body = f"{shown}{facts}".replace("<pre>", "<pre tabindex=0>")  # keys must reach what is wider than a phone
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Model card</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><style>{STYLE}</style><main>{body}</main></html>'
    )


def _parts(text: str) -> tuple[str, str]:
    """The YAML between the first two lines of dashes, and the rest."""
    if not text.startswith("---\n"):
        return "", text
    front, _, body = text[4:].partition("\n---\n")
    return front, body
