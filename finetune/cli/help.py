"""The first page of the command: what a person needs first comes first."""

from __future__ import annotations

from typing import Any

from finetune.cli.output import PlainGroup

SECTIONS = {
    "Train, draw and export": (
        *("demo", "dreambooth", "train", "sample", "evaluate"),
        *("export", "resume", "report", "ui"),
    ),
    "Before a run": ("data", "plan", "recipes", "tokens", "inspect", "doctor"),
    "LoRA files": ("verify", "convert", "resize", "merge", "extract"),
}
HELP = """Fine-tune and personalise diffusion models, and check the results.

\b
Try it in minutes, without a GPU:
  finetune demo
Your own photos:
  finetune dreambooth PHOTOS --class-noun dog \\
      --base stable-diffusion-v1-5/stable-diffusion-v1-5
"""


class Sections(PlainGroup):
    """Commands in `SECTIONS`, before the options."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the sections; what is in none comes last."""
        wanted = [name for names in SECTIONS.values() for name in names]
        return sorted(self.commands, key=lambda name: wanted.index(name) if name in wanted else len(wanted))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the commands, then the options."""
        for title, names in SECTIONS.items():
            self._section(formatter, title, [name for name in names if name in self.commands])
        known = {name for names in SECTIONS.values() for name in names}
        self._section(formatter, "More", [name for name in self.list_commands(ctx) if name not in known])
        rows = [found for item in self.get_params(ctx) if (found := item.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl(rows)

    def _section(self, formatter: Any, title: str, names: list[str]) -> None:
        if not names:
            return
        width = max(len(name) for name in self.commands)
        rows = [
            (name.ljust(width), self.commands[name].get_short_help_str(formatter.width - 6 - width)) for name in names
        ]
        with formatter.section(title):
            formatter.write_dl(rows)
