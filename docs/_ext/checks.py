"""Fail a build that would let its reader down, by warnings that name the page and the item.

In the built site: links and anchors that lead nowhere, whatever but a link leads to another host (scripts, fonts,
images, styles), images without alternative text, pages without a title. Beside it: links and images of README.md and
its like that lead to no file or heading of the repository, and committed figures that are older than their data.
"""

import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from sphinx.application import Sphinx
from sphinx.util import logging

from benchmarks import figures

REPOSITORY = Path(__file__).parents[2]
READ_ON_THEIR_OWN = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")  # not pages of the site
LOADED = {"link": "href", "script": "src", "img": "src", "source": "src", "iframe": "src", "object": "data"}
CSS_URL = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")


class Page(HTMLParser):
    """What a page has that others can lead to, and where it leads itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []  # where a reader can go
        self.loaded: list[str] = []  # what the browser fetches without being asked
        self.mute: list[str] = []  # images without alternative text
        self.title = ""
        self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = {name: value or "" for name, value in attrs}
        self.anchors |= {own[name] for name in ("id", "name") if name in own}
        if tag == "a" and "href" in own:
            self.links.append(own["href"])
        elif tag == "form" and "action" in own:
            self.links.append(own["action"])
        elif LOADED.get(tag) in own:
            self.loaded.append(own[LOADED[tag]])
        self.loaded += [part.split()[0] for part in own.get("srcset", "").split(",") if part.strip()]
        self.loaded += styles(own.get("style", ""))
        if tag == "img" and not own.get("alt", "").strip():
            self.mute.append(own.get("src", "?"))
        self._in_title = tag == "title" and not self.title

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data.strip()

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False


def styles(css: str) -> list[str]:
    """The addresses in a style."""
    return [first or second for first, second in CSS_URL.findall(css)]


def of_site(site: Path) -> Iterator[str]:
    """What is wrong with a built site; each line begins with the page."""
    files = {file for file in site.rglob("*.html") if file.relative_to(site).parts[0] not in ("_static", "_downloads")}
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(files)}
    for file, page in pages.items():
        name = file.relative_to(site)
        if not page.title:
            yield f"{name}: no title"
        for image in page.mute:
            yield f"{name}: image {image} has no alternative text"
        for url in page.loaded:
            if wrong := _fetched(file, url):
                yield f"{name}: {wrong}"
        for url in page.links:
            if wrong := _followed(file, url, pages):
                yield f"{name}: {wrong}"
    for file in sorted(site.rglob("*.css")):
        for url in styles(file.read_text(encoding="utf-8")):
            if wrong := _fetched(file, url):
                yield f"{file.relative_to(site)}: {wrong}"


def _fetched(file: Path, url: str) -> str | None:
    parts = urlsplit(url)
    if parts.scheme == "data":
        return None
    if parts.scheme or parts.netloc:
        return f"{url} would be fetched from another host"
    if parts.path and not (file.parent / unquote(parts.path)).is_file():
        return f"{url} is not there"
    return None


def _followed(file: Path, url: str, pages: dict[Path, Page]) -> str | None:
    parts = urlsplit(url)
    if parts.scheme or parts.netloc:
        return None if parts.scheme in ("http", "https", "mailto") else f"link {url} leads off the web"
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return f"link {url} leads to no file"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return f"link {url} leads to no anchor"
    return None


@cache
def _tokens(file: Path) -> list:
    parser = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)
    return parser.parse(file.read_text(encoding="utf-8"))


def of_markdown(file: Path) -> Iterator[str]:
    """What is wrong with the links and images of a file that is read where it lies."""
    for block in _tokens(file):
        for token in block.children or ():
            url = token.attrs.get("href") or token.attrs.get("src")
            if token.type == "image" and not token.content.strip():
                yield f"{file.name}: image {url} has no alternative text"
            parts = urlsplit(str(url or ""))
            if url is None or parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.exists():
                yield f"{file.name}: {url} leads to no file"
            elif parts.fragment and target.suffix == ".md" and unquote(parts.fragment) not in headings(target):
                yield f"{file.name}: {url} leads to no heading"


def headings(file: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a file."""
    return {str(token.attrs["id"]) for token in _tokens(file) if token.type == "heading_open"}


def check(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    logger = logging.getLogger(__name__)
    _tokens.cache_clear()
    for wrong in of_site(Path(app.outdir).resolve()):
        logger.warning("%s", wrong, type="checks")
    for name in READ_ON_THEIR_OWN:
        for wrong in of_markdown(REPOSITORY / name):
            logger.warning("%s", wrong, type="checks")
    for wrong in figures.wrong():
        logger.warning("%s", wrong, type="checks")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
