"""The build of the site names what would let a reader down (docs/_ext/checks.py)."""

from pathlib import Path

import pytest

from tests.extensions import ROOT, extension

checks = extension("checks")

from sphinx.cmd.build import build_main  # noqa: E402 - which may not be there

EXTENSIONS = ROOT / "docs/_ext"

HEAD = "<title>A page</title>"
WRONG = {
    "no title": ("<p>", "no title"),
    "no such page": (HEAD + '<a href="other.html">', "link other.html leads to no file"),
    "no such anchor here": (HEAD + '<a href="#nowhere">', "link #nowhere leads to no anchor"),
    "no such anchor there": (HEAD + '<a href="sub/page.html#nowhere">', "leads to no anchor"),
    "another scheme": (HEAD + '<a href="file:///etc/hosts">', "leads off the web"),
    "no words": (HEAD + '<img src="dot.png">', "image dot.png has no alternative text"),
    "empty words": (HEAD + '<img src="dot.png" alt=" ">', "image dot.png has no alternative text"),
    "no such image": (HEAD + '<img src="dash.png" alt="a dash">', "dash.png is not there"),
    "a script from elsewhere": (HEAD + '<script src="https://cdn.example/x.js"></script>', "another host"),
    "a style from elsewhere": (HEAD + '<link rel="stylesheet" href="//cdn.example/x.css">', "another host"),
    "a font in a style": (HEAD + '<p style="background: url(https://x.example/y.png)">', "another host"),
    "a second image": (HEAD + '<img src="dot.png" alt="a dot" srcset="dot.png 1x, big.png 2x">', "big.png is not"),
}
RIGHT = (
    HEAD + '<a href="sub/">to a folder</a><a href="sub/page.html?q=1#there">, a place</a><a href="#here" id="here">'
    '<a href="https://example.org/x#y">elsewhere</a><a href="mailto:a@example.org">'
    '<img src="dot.png?v=1" alt="a dot"><img src="data:image/gif;base64,AA" alt="a drop">'
)


@pytest.fixture
def site(tmp_path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("index", "page"):
        (tmp_path / f"sub/{name}.html").write_text(HEAD + '<h1 id="there"><a href="../index.html">')
    (tmp_path / "dot.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(("html", "words"), WRONG.values(), ids=WRONG)
def test_a_page_that_is_wrong_is_named(site, html, words):
    (site / "index.html").write_text(html)
    (found,) = checks.of_site(site)
    assert found.startswith("index.html: ")
    assert words in found


def test_a_page_that_is_right_is_not(site):
    (site / "index.html").write_text(RIGHT)
    assert list(checks.of_site(site)) == []


def test_a_style_that_fetches_is_named(site):
    (site / "index.html").write_text(HEAD)
    (site / "own.css").write_text("@import 'https://fonts.example/a.css'; p { background: url('dot.png') }")
    (found,) = checks.of_site(site)
    assert found == "own.css: https://fonts.example/a.css would be fetched from another host"


def test_links_of_a_readme(tmp_path):
    (tmp_path / "other.md").write_text("# Some heading, *here*\n")
    text = "[a](other.md) [b](other.md#some-heading-here) [c](https://example.org) [d](#top)\n\n# Top\n"
    (tmp_path / "README.md").write_text(text)
    assert list(checks.of_markdown(tmp_path / "README.md")) == []
    (tmp_path / "README2.md").write_text("[a](gone.md) [b](other.md#gone) ![](other.md)\n")
    assert list(checks.of_markdown(tmp_path / "README2.md")) == [
        "README2.md: gone.md leads to no file",
        "README2.md: other.md#gone leads to no heading",
        "README2.md: image other.md has no alternative text",
    ]


@pytest.mark.filterwarnings("ignore")  # of Sphinx and docutils
def test_the_build_fails_and_names_the_page(tmp_path, capfd):
    (tmp_path / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(EXTENSIONS)!r})\nextensions = ['myst_parser', 'checks']\n"
    )
    (tmp_path / "dot.png").write_bytes(b"")
    page = "# A page\n\n![{}](dot.png)\n"
    (tmp_path / "index.md").write_text(page.format(""))
    build = ["-q", "--fail-on-warning", str(tmp_path), str(tmp_path / "out")]
    assert build_main(build) == 1
    assert "index.html: image _images/dot.png has no alternative text" in capfd.readouterr().err
    (tmp_path / "index.md").write_text(page.format("a dot"))
    assert build_main(build) == 0, capfd.readouterr().err
