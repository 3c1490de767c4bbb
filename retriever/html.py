"""Pages to text: the main part of an HTML page as paragraphs, with headings and lists marked as in Markdown.

selectolax parses; which part is text is read from the page's own structure. Extractors that score paragraphs, such as
trafilatura, find the article on a page of divs, but were seen to drop half of a manual page, code and all, without
a word; and a document that is loaded should be there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from chunkcache.errors import DocumentError, missing_extra

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

logger = logging.getLogger(__name__)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NEVER = _words(
    "head script style noscript template iframe object embed svg canvas audio video button select input "
    "textarea datalist dialog"
)
_NAVIGATION = _words("nav menu")
_NAVIGATION_ROLES = _words("navigation search")
_FURNITURE = _words("header footer aside")
_FURNITURE_ROLES = _words("banner contentinfo complementary")
_INVISIBLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_MARKS = frozenset(_HEADINGS.values())
_LINES = _words("li tr dt dd br option summary")  # on lines of their own
_BLOCKS = _HEADINGS.keys() | _words(
    "address article aside blockquote body caption center details div dl fieldset figcaption figure "
    "footer form header hr legend main nav ol p pre section table tbody tfoot thead ul"
)
# A main part with less than this share of the text is thought to be something else: a teaser, a comment.
_LEAST = 0.25
# The rules of HTML make a parser look at all open elements at each tag: 40,000 open ones take seconds.
_DEEPEST = 2000
_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)")
# These may be many and open, or are empty.
_CLOSED_BY_OTHERS = _words(
    "area base br col embed hr img input link meta param source track wbr p li dt dd tr td th thead tbody "
    "tfoot option optgroup colgroup caption rt rp html head body"
)


def html_parts(source: str, name: str) -> tuple[str, str | None]:
    """Return the text of a page and its title; `name` stands in the log and in errors.

    Raises DocumentError when elements are nested thousands deep.
    """
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError as error:
        raise missing_extra("retriever", f"reading the page {name!r}", error) from error
    _refuse_depth(source, name)
    tree = LexborHTMLParser(source)
    body = tree.body
    if body is None:
        return "", None
    page = _text(body, main=False)
    marked = [*tree.css("main, [role=main]")[:1]] or _outermost(tree.css("article"))
    text = "\n\n".join(filter(None, (_text(node, main=True) for node in marked)))
    if len(text) < _LEAST * len(page):
        text, marked = page, []
    if not text and (text := _text(body, main=False, visible=True)):
        logger.warning("no main text in %s: took all that is visible, navigation too", name)
    headings = [_text(node, main=True).removeprefix("# ") for root in marked or [body] for node in root.css("h1")]
    titles = [" ".join(node.text().split()) for node in tree.css("head > title")]
    # One heading names the page better than <title>, which often names the site too; of several, none does.
    ranked = [*titles, *headings] if len(headings) > 1 else [*headings, *titles]
    return text, next((" ".join(title.split()) for title in ranked if title.strip()), None)


def _refuse_depth(source: str, name: str) -> None:
    depth = deepest = 0
    for closing, tag in _TAG.findall(source):
        if tag.lower() not in _CLOSED_BY_OTHERS:
            depth = max(0, depth - 1) if closing else depth + 1
            deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        raise DocumentError(f"{name!r} nests elements {deepest} deep, more than {_DEEPEST}: mend it, or leave it out")


def _outermost(nodes: list[LexborNode]) -> list[LexborNode]:
    inner = {found.mem_id for node in nodes for found in node.css("article") if found.mem_id != node.mem_id}
    return [node for node in nodes if node.mem_id not in inner]


def _text(root: LexborNode, *, main: bool, visible: bool = False) -> str:  # noqa: C901 - one state machine
    """Return the text below a node; not navigation unless `visible`, nor, out of the main part, header and footer."""
    out: list[str] = []
    line: list[str] = []
    gap = mark = ""
    preformatted = 0

    def end_line() -> None:
        nonlocal gap, mark
        text = "".join(line).strip("\n").rstrip() if preformatted else " ".join("".join(line).split())
        line.clear()
        text = text.removesuffix(" |")
        if mark in _MARKS:
            text = text.rstrip("¶ ")  # a link that generators of documentation put there
        if text.strip():
            out.append((gap if out else "") + mark + text)
            gap = mark = ""

    # With a stack of its own, because pages may be nested deeper than Python recurses.
    for node, entering in _walk(root, main, visible):
        tag = node.tag
        if tag == "-text":
            line.append(node.text_content or "")
        elif tag in _LINES or tag in _BLOCKS:
            end_line()
            gap = "\n" if tag in _LINES and gap != "\n\n" else "\n\n"
            if tag == "pre":
                preformatted += 1 if entering else -1
            elif entering:
                mark = "- " if tag == "li" else _HEADINGS.get(tag or "", mark)
            elif tag in _HEADINGS:
                mark = ""
        elif tag in ("td", "th") and not entering:
            line.append(" | ")
    end_line()
    return "".join(out)


def _walk(root: LexborNode, main: bool, visible: bool) -> Iterator[tuple[LexborNode, bool]]:
    stack = [(root, True)]
    while stack:
        node, entering = stack.pop()
        yield node, entering
        if entering and node.tag != "-text":
            stack.append((node, False))
            children = [child for child in node.iter(include_text=True) if not _left_out(child, main, visible)]
            stack += [(child, True) for child in reversed(children)]


def _left_out(node: LexborNode, main: bool, visible: bool) -> bool:
    tag = node.tag
    if tag == "-text":
        return False
    if tag in _NEVER:
        return True
    attributes = node.attributes
    if "hidden" in attributes or attributes.get("aria-hidden") == "true":
        return True
    if _INVISIBLE.search(attributes.get("style") or ""):
        return True
    role = attributes.get("role")
    if visible:
        return False
    if tag in _NAVIGATION or role in _NAVIGATION_ROLES:
        return True
    return not main and (tag in _FURNITURE or role in _FURNITURE_ROLES)
