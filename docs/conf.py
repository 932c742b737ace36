"""The documentation site: Sphinx with MyST and furo. `make docs` builds it into build/site."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]  # for `import benchmarks`

project = "lowbit-optim"
author = "The lowbit-optim authors"
copyright = author
version = release = installed("lowbit-optim")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "mathml",
    "back_links",
    "checks",
]
exclude_patterns = ["_ext", "_templates", "**/README*"]
suppress_warnings = ["config.cache"]  # sphinx-gallery's settings hold functions, which cannot be kept between builds

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 4  # links to headings: page.md#what-is-kept

autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "lowbit-optim"
html_math_renderer = "mathml"  # browsers set MathML themselves: no script and no font from elsewhere
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
templates_path = ["_templates"]
html_domain_indices = False  # the index of names has modules, too
