"""The fenced code blocks of README and of the site's pages."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
CODE = {"{code-block}", "{code}", "{testcode}"}  # directives that show their content as code


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.strip().splitlines()]

    @property
    def name(self) -> tuple[str, str]:
        """What the table of exceptions calls it: its page and its first line."""
        return self.page, self.lines[0] if self.lines else ""


def pages() -> list[str]:
    """All that is collected, from the repository's root."""
    site = sorted(ROOT.glob("docs/**/*.md"))
    return ["README.md", "CONTRIBUTING.md", *(str(path.relative_to(ROOT)) for path in site)]


def blocks(page: str) -> list[Block]:
    return list(_found(page, (ROOT / page).read_text(encoding="utf-8"), 0))


def _found(page: str, text: str, above: int) -> Iterator[Block]:
    for token in MarkdownIt("commonmark").parse(text):
        if token.type not in ("fence", "code_block"):
            continue
        assert token.map is not None
        line = above + token.map[0] + 1
        directive, _, argument = token.info.strip().partition(" ")
        if token.type == "code_block":  # indented
            program = token.content.split()[0]
            yield Block(page, line, "sh" if program in ("make", "python", "lowbit-optim") else "text", token.content)
        elif directive in CODE:
            yield Block(page, line, argument.strip(), _without_options(token.content))
        elif directive.startswith("{"):
            yield from _found(page, token.content, line)  # what a note or a tab holds
        else:
            yield Block(page, line, directive, token.content)


def _without_options(content: str) -> str:
    return re.sub(r"\A(:[\w-]+:.*\n)+\n?", "", content)
