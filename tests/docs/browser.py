"""Every page of the built site in a browser, on a desk and on a phone, light and dark: `make docs site-test`.

Not collected by plain pytest: it needs Debian's chromium and a built site. SITE_SCREENSHOTS=folder keeps what was seen.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urldefrag, urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, sync_playwright

SITE = Path(__file__).parents[2] / "build/site"
PAGES = sorted(
    str(file.relative_to(SITE))
    for file in SITE.rglob("*.html")
    if file.relative_to(SITE).parts[0] not in ("_static", "_downloads")
)
VIEWS = {"desk": (1280, 800, "light"), "phone": (375, 812, "dark")}
OTHERS = {"desk": "dark", "phone": "light"}  # of the first page, so that each size is seen in both
SHOTS = os.environ.get("SITE_SCREENSHOTS")
NAVIGATION = ".sidebar-tree a, .sidebar-brand, .related-pages a, .toctree-wrapper a"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Of every request, nothing."""


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Where the site is served."""
    assert PAGES, f"there is no site in {SITE}: run `make docs` first"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.fail("there is no chromium; on Debian: apt-get update && apt-get install -y chromium")
    with sync_playwright() as playwright:
        # Chromium's sandbox refuses to work for root, which is who runs CI.
        own = playwright.chromium.launch(executable_path=path, chromium_sandbox=os.geteuid() != 0)
        yield own
        own.close()


@pytest.fixture(scope="session", params=VIEWS)
def view(request, browser) -> Iterator[tuple[str, BrowserContext]]:
    """A window of one size and scheme."""
    width, height, scheme = VIEWS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    yield request.param, context
    context.close()


@dataclass
class Seen:
    """What went wrong while a page was open."""

    address: str
    wrong: list[str] = field(default_factory=list)

    def watch(self, page: Page) -> None:
        page.on("console", lambda said: self.wrong.append(f"console: {said.text}") if said.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        page.on("requestfailed", lambda request: self.wrong.append(f"failed: {request.url}"))
        page.on("response", lambda r: self.wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
        page.route("**/*", self.only_here)

    def only_here(self, route: Route, request: Request) -> None:
        if request.url.startswith((self.address, "data:", "blob:")):
            route.continue_()
        else:
            self.wrong.append(f"another host: {request.url}")
            route.abort()


def look(page: Page) -> list[str]:
    """What is wrong with an open page."""
    wrong = []
    wide, room = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    if wide > room:
        wrong.append(f"scrolls sideways: {wide} in {room} px, by {page.evaluate(WIDEST)}")
    for image in page.locator("img").all():
        image.evaluate("image => { image.loading = 'eager'; return image.decode().catch(() => null) }")
        if not image.evaluate("image => image.complete && image.naturalWidth > 0"):
            wrong.append(f"image {image.get_attribute('src')} did not load")
    return wrong


WIDEST = """() => {
    const room = document.documentElement.clientWidth
    const scrolls = element => element && (getComputedStyle(element).overflowX !== 'visible'
        || getComputedStyle(element).position === 'fixed' || scrolls(element.parentElement))
    return [...document.querySelectorAll('body *')]
        .filter(element => element.getBoundingClientRect().right > room + 1 && !scrolls(element.parentElement))
        .map(element => `${element.tagName}.${element.className}`).slice(0, 5).join(', ')
}"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page(name, view, address):
    label, context = view
    page, seen = context.new_page(), Seen(address)
    seen.watch(page)
    page.goto(address + name, wait_until="load")
    wrong = look(page) + seen.wrong
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name.removesuffix('.html').replace('/', '-')}-{label}.png")
    page.close()
    assert not wrong, "\n".join([name, *wrong])


@pytest.mark.parametrize("label", OTHERS)
def test_the_first_page_in_the_other_scheme(label, browser, address):
    width, height, _ = VIEWS[label]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=OTHERS[label])
    seen = Seen(address)
    seen.watch(page)
    page.goto(address, wait_until="load")
    wrong = look(page) + seen.wrong
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"index-{label}-{OTHERS[label]}.png")
    page.close()
    assert not wrong, "\n".join(wrong)
    assert (ground == "rgb(255, 255, 255)") == (OTHERS[label] == "light"), ground


def test_navigation_reaches_every_page(browser, address):
    """By links of the sidebar and of the lists of pages; sources and indexes, which are made, by any link."""
    page = browser.new_page()
    reached, left = {"index.html"}, ["index.html"]
    while left:
        here = left.pop()
        page.goto(address + here)
        every = "a, form" if is_made(here) or here == "search.html" else NAVIGATION
        own = page.eval_on_selector_all(every, "items => items.map(item => item.href || item.action)")
        if every == NAVIGATION:
            own += [url for url in page.eval_on_selector_all("a", "all => all.map(a => a.href)") if is_made_url(url)]
            own += page.eval_on_selector_all("form", "forms => forms.map(form => form.action)")
        names = {urldefrag(str(url)).url.removeprefix(address) or "index.html" for url in own}
        new = {name for name in names if name in PAGES} - reached
        reached |= new
        left += sorted(new)
    page.close()
    assert set(PAGES) - reached == set()


def is_made(name: str) -> bool:
    """Whether Sphinx made a page without a source of ours."""
    return name.startswith("_modules/") or name in ("genindex.html", "py-modindex.html")


def is_made_url(url: str) -> bool:
    return is_made(urlsplit(url).path.removeprefix("/"))


def test_search_finds_shampoo(browser, address):
    page, seen = browser.new_page(), Seen(address)
    seen.watch(page)
    page.goto(address)
    page.fill(".sidebar-search", "Shampoo")
    page.press(".sidebar-search", "Enter")
    results = page.locator("#search-results li a")
    results.first.wait_for()
    page.wait_for_load_state("networkidle")
    found = [urlsplit(str(link.get_attribute("href"))).path for link in results.all()]
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / "search-results.png")
    results.first.click()
    page.wait_for_load_state("networkidle")
    assert "Shampoo" in page.inner_text("body")
    page.close()
    assert len(set(found)) > 3, found
    assert not seen.wrong, "\n".join(seen.wrong)
