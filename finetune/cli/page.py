"""The command that opens the web page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.output import say


def ui(
    folder: Annotated[Path, typer.Option("--folder", help="where uploaded photos and logs go")] = Path("finetune-ui"),
    runs: Annotated[Path, typer.Option("--runs", help="the folder with the runs")] = Path("runs"),
    bases: Annotated[Path, typer.Option("--bases", help="a folder with base models to choose from")] = Path("bases"),
    port: Annotated[int | None, typer.Option("--port", min=0, max=65_535, help="default: a free one")] = None,
    host: Annotated[
        str, typer.Option("--host", help="another address than this machine's own needs FINETUNE_UI_PASSWORD")
    ] = "127.0.0.1",
) -> None:
    """Open a web page: photos in, adapter out, with the proof. It runs on this machine."""
    from finetune.ui.serve import Opening, serve

    password = os.environ.get("FINETUNE_UI_PASSWORD", "")
    serve(Opening(folder, runs, bases, host, port, password), say)
