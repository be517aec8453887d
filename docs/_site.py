"""What mkdocs changes on the way from these pages, which also read well in the repository, to the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The first page is README.md; a link to a file of the repository that is no page becomes the name of that file."""
    source = Path(page.file.src_uri)
    if source.name == "index.md" and source.parent == Path():
        return _linked((ROOT / "README.md").read_text(), ROOT)
    return _linked(markdown, (ROOT / "docs" / source).parent)


def on_page_content(html: str, **_: Any) -> str:
    """Roles of docstrings (:class:`dampr.Plan`) become what they are in the terminal too: the name."""
    return re.sub(r":(?:class|func|meth|attr|mod|data|doc):(<code>)(?:~)?", r"\1", html)


def _linked(markdown: str, folder: Path) -> str:
    def change(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve()
        if file == ROOT / "README.md":
            return f"[{text}](index.md)"
        if not file.is_relative_to(ROOT / "docs"):
            name = f"`{file.relative_to(ROOT)}`"
            return name if text.strip("`") in (file.name, str(file.relative_to(ROOT))) else f"{text} ({name})"
        inside = file.relative_to(ROOT / "docs")
        depth = len((folder.relative_to(ROOT / "docs")).parts) if folder.is_relative_to(ROOT / "docs") else 0
        return f"{image}[{text}]({'../' * depth}{inside}{'#' * bool(anchor)}{anchor})"

    return _LINK.sub(change, markdown)


class FencedExamples(griffe.Extension):
    """Examples in docstrings, which begin with ``>>>``, are code blocks on the site."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"(?m)((?:^ *>>> .*\n?)(?:^.+\n?)*)", r"```python\n\1\n```\n", obj.docstring.value
            )
