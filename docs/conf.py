"""The documentation site: Sphinx with MyST and furo. `make docs` builds it into build/site."""

import os
import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
os.environ["OMP_NUM_THREADS"] = "1"  # the tutorials' figures are the same on every machine that rounds alike
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]  # our extensions; benchmarks/, whose tables they make
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type] # the folder there is not the package of that name

project = "lowbit-optim"
author = "The lowbit-optim authors"
copyright = author
version = release = installed("lowbit-optim")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "public",
    "states",
    "commands",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "figures",
    "results",
    "back_links",
    "checks",
]
# sphinx-gallery writes the pages of tutorials/ into gallery/.
exclude_patterns = ["_ext", "_templates", "**/README*", "tutorials"]
suppress_warnings = ["config.cache"]  # sphinx-gallery's settings hold functions, which cannot be kept between builds

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_heading_anchors = 4  # links to headings: page.md#what-is-kept

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
smartquotes_action = "D"  # dashes, but no quotes: "root" is a string to type
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # types and defaults are in the signature; "betas, eps: ..." is about both
napoleon_use_rtype = False
# Names of Python's and torch's own: links to their sites could not be checked without the network.
nitpick_ignore_regex = [("py:class", r"(collections|os|torch)\..*|ProcessGroup")]

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "copyfile_regex": r"index\.rst",  # our own first page, without thumbnails
    "abort_on_example_error": True,
    "write_computation_times": False,
    "min_reported_time": float("inf"),
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "remove_config_comments": True,
}

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
