"""MkDocs hook: a link from a page to a file that is not on the site becomes its text."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[([^]]+)\]\(([^)#:]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the page without links to files outside docs/; one that leads nowhere stays, and is a warning."""
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def without_link(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        made = target.name == "report.html"  # by `make report`; not on the site
        return link[1] if made or (target.exists() and not target.is_relative_to(ROOT / "docs")) else link[0]

    return LINK.sub(without_link, markdown)
