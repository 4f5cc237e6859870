"""The commands that list things: `finetune recipes ...` and `finetune tokens ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.adapters import BaseOption
from finetune.cli.output import loud
from finetune.core.errors import BadInput, CheckFailed
from finetune.core.reading import read_utf8
from finetune.families.toy import TINY

recipes_app = typer.Typer(
    name="recipes",
    help="List, print and copy the recipes that come with finetune.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
tokens_app = typer.Typer(
    name="tokens", help="Find and check rare tokens of a base.", no_args_is_help=True, rich_markup_mode=None
)


@recipes_app.command("list")
def recipes_list() -> None:
    """List the recipes and what each is for."""
    from finetune.config import recipes

    for name in recipes.names():
        typer.echo(f"{name:<18} {recipes.summary(recipes.find(name))}")


@recipes_app.command("show")
def recipes_show(name: str) -> None:
    """Print a recipe."""
    from finetune.config import recipes

    typer.echo(read_utf8(recipes.find(name)), nl=False)


@recipes_app.command("copy")
def recipes_copy(name: str, to: Annotated[Path | None, typer.Argument(help="name of the new file")] = None) -> None:
    """Copy a recipe to a new file, to edit it."""
    from finetune.config import recipes

    target = to or Path(f"{name}.yaml")
    if target.exists():
        raise BadInput(f"{target} already exists: give another name")
    content = recipes.find(name).read_bytes()
    if not target.parent.is_dir():
        raise BadInput(f"there is no folder {target.parent}: make it first, or give another name")
    target.write_bytes(content)
    typer.echo(f"wrote {target}; train it with: finetune train {target}")


@recipes_app.command("schema")
def recipes_schema(to: Annotated[Path, typer.Argument(help="a JSON file")] = Path("recipe.schema.json")) -> None:
    """Write the JSON schema of a recipe, for editors."""
    from finetune.config.recipe import json_schema
    from finetune.core.files import write_json

    write_json(to, json_schema())
    typer.echo(f"wrote {to}; in an editor: # yaml-language-server: $schema={to}")


@tokens_app.command("suggest")
def tokens_suggest(
    base: BaseOption = "tiny",
    count: Annotated[int, typer.Option("-n", min=1, help="how many")] = 10,
    class_noun: Annotated[str | None, typer.Option("--class-noun", help="what the subject is, such as dog")] = None,
) -> None:
    """Suggest rare tokens of a base. Each is one token of its tokenizers, has no known meaning, is noticed by the text
    encoders, and hardly changes what the base draws."""
    loud()
    from finetune.data import meanings, tokens
    from finetune.families.source import load_family

    found = tokens.suggest(load_family(base), count, class_noun)
    _say_base(base)
    for token in found:
        measured = f"prior strength {token.strength:.3f}  embedding moved by {token.distance:.2f}"
        ends = meanings.pieces().get(token.text)
        typer.echo(f"{token.text:<6} rank {token.rank:.3f}  {measured}{f'  (the end of: {ends})' if ends else ''}")


@tokens_app.command("check")
def tokens_check(
    token: str,
    base: BaseOption = "tiny",
    class_noun: Annotated[str | None, typer.Option(help="what the subject is, such as dog")] = None,
) -> None:
    """Check how a base reads one token. Exit 1 if it should not be used."""
    loud()
    from finetune.data import tokens
    from finetune.families.source import load_family

    found = tokens.check(load_family(base), token, class_noun)
    _say_base(base)
    measured = (
        f"; prior strength {found.strength:.3f}, embedding moved by {found.distance:.2f}" if found.single else ""
    )
    typer.echo(found.verdict + measured)
    if not found.good:
        raise CheckFailed(
            f"{token!r} is not a good rare token: `finetune tokens suggest --base {base}` finds better ones"
        )


def _say_base(base: str) -> None:
    """To stderr, as notes are. Nobody who left --base out means the toy: another base reads other words."""
    own = ", the toy of this package: give the base that you train on with --base" if base == TINY else ""
    typer.echo(f"for the base {base}{own}", err=True)
