"""Hooks of mkdocs: pages that lie outside docs/, and the API reference from the package tree.

mkdocs calls `on_config`, `on_files` and `on_page_markdown` (https://www.mkdocs.org/user-guide/configuration/#hooks).
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = "docs"
PACKAGES = ("finetune", "data_tools")
# a file of the repository -> its page
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_config(config: Any) -> Any:
    named = set(_leaves(config.nav))
    more = [file.name for file in sorted((ROOT / DOCS).glob("*.md")) if file.name not in named]
    api = [_section(ROOT / package) for package in PACKAGES]
    config.nav = [*config.nav, *([{"More": more}] if more else []), {"API": api}]
    config.watch += [str(ROOT / name) for name in (*PACKAGES, *PAGES)]
    return config


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for package in PACKAGES:
        for module in _modules(ROOT / package):
            files.append(File.generated(config, _page_of(module), content=_api(module)))
    for source in sorted(_linked()):
        page = File.generated(config, _site(source), content=_shown(ROOT / source))
        page.inclusion = page.inclusion.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links between files of the repository become links between pages."""
    source = _source(page.file.src_uri)
    return markdown if source is None else LINK.sub(lambda link: _relinked(link, source, page.file.src_uri), markdown)


def _relinked(link: re.Match, source: str, page: str) -> str:
    target = _target(link[2], source)
    return (
        link[0] if target is None else f"{link[1]}{posixpath.relpath(_site(target), posixpath.dirname(page))}{link[3]}"
    )


def _target(link: str, source: str) -> str | None:
    """The file of the repository that a link in `source` means."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if "://" not in link and (ROOT / path).is_file() else None


def _site(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return f"files/{path.removesuffix('.md')}.md"


def _source(page: str) -> str | None:
    """The file of the repository that a page shows; None for a page that is made here."""
    outside = {_site(source): source for source in (*PAGES, *_linked())}
    inside = f"{DOCS}/{page}"
    return outside.get(page) or (inside if (ROOT / inside).is_file() else None)


@cache
def _linked() -> frozenset[str]:
    """Files outside docs/ that a page links to, with what those link to."""
    waiting = [*PAGES, *(file.relative_to(ROOT).as_posix() for file in (ROOT / DOCS).glob("*.md"))]
    found: set[str] = set()
    while waiting:
        source = waiting.pop()
        links = LINK.findall((ROOT / source).read_text(encoding="utf-8"))
        targets = {target for _, link, _ in links if (target := _target(link, source))}
        new = {path for path in targets if path not in found | set(PAGES) and not path.startswith(f"{DOCS}/")}
        found |= new
        waiting += [path for path in new if path.endswith(".md")]
    return frozenset(found)


def _shown(path: Path) -> str:
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return content
    if path.suffix == ".ipynb":
        return "\n\n".join(_cell(cell) for cell in json.loads(content)["cells"])
    return f"# {path.relative_to(ROOT).as_posix()}\n\n{_code(content, path.suffix[1:])}"


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return _code(f"{text}\n", "python") if cell["cell_type"] == "code" else text


def _code(content: str, language: str) -> str:
    return f"````{language}\n{content}````\n"


def _modules(folder: Path) -> Iterator[Path]:
    """The public modules of a package: it comes before what is in it."""
    yield folder / "__init__.py"
    for item in sorted(folder.iterdir()):
        if (item / "__init__.py").is_file():
            yield from _modules(item)
        elif item.suffix == ".py" and not item.name.startswith("_"):
            yield item


def _name(module: Path) -> str:
    parts = module.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _page_of(module: Path) -> str:
    path = module.relative_to(ROOT).with_suffix("").as_posix()
    return f"api/{path.replace('__init__', 'index')}.md"


def _api(module: Path) -> str:
    text = f"# {_name(module)}\n\n::: {_name(module)}\n"
    if module.name != "__init__.py":
        return text
    here = posixpath.dirname(_page_of(module))
    lines = [
        f"- [{_name(item)}]({posixpath.relpath(_page_of(item), here)}): {_first(item)}"
        for item in _children(module.parent)
    ]
    return text + "\n## Modules\n\n" + "\n".join(lines) + "\n"


def _children(folder: Path) -> list[Path]:
    """What is directly in a package: its modules, and its packages by their __init__.py."""
    packages = [item / "__init__.py" for item in folder.iterdir()]
    return [item for item in _modules(folder) if item.parent == folder or item in packages][1:]


def _first(module: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def _section(folder: Path) -> dict[str, list]:
    pages: list = [_page_of(folder / "__init__.py")]
    for item in _children(folder):
        pages.append(_section(item.parent) if item.name == "__init__.py" else {item.stem: _page_of(item)})
    return {folder.name: pages}


def _leaves(nav: Any) -> Iterator[str]:
    for item in nav:
        if isinstance(item, str):
            yield item
        else:
            for value in item.values():
                yield from [value] if isinstance(value, str) else _leaves(value)
