"""Links to sources from every page, and from sources back to where the reference has them.

viewcode takes the first module by which anything of a source file is documented for that of all; anchors of the others
are looked up here.
"""

import posixpath
import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

BACK = re.compile(r'(?<=class="viewcode-back" href=")([^"#]+)#([^"]+)')


def mend(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    context["sources"] = bool(getattr(app.env, "_viewcode_modules", None))  # for sidebar/navigation.html
    if not pagename.startswith("_modules/"):
        return
    documented = app.env.domains.python_domain.objects

    def found(link: re.Match[str]) -> str:
        page, name = link.groups()
        if name in documented:
            return link[0]
        parts, target = name.split("."), posixpath.normpath(posixpath.join(posixpath.dirname(pagename), page))
        for i in range(1, len(parts)):  # the longest end that is documented on that page
            for other, entry in documented.items():
                if other.endswith("." + ".".join(parts[i:])) and target == f"{entry.docname}.html":
                    return f"{page}#{entry.node_id}"
        return link[0]

    context["body"] = BACK.sub(found, context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
