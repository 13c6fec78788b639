"""The documentation as HTML, for `make docs`.

The sources' root is the repository's, so that a link leads to the same place here and on GitHub.
"""

from urllib.parse import urlsplit

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

project = "pion_dist"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["README.md", "CONTRIBUTING.md", "docs/*.md"]
exclude_patterns = [".venv"]  # not searched either
root_doc = "docs/index"
nitpicky = True
# Links to torch and Python would need their inventories. Storage is for wrappers.
nitpick_ignore_regex = [
    ("py:class", r"(torch|collections)\..*|Tensor|pion_dist\.slots\.Storage"),
]
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # the signature has the types
python_display_short_literal_types = True
python_maximum_signature_line_length = 90
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as GitHub has them
smartquotes = False  # would make dashes of flags
highlight_language = "none"  # of blocks that name none
html_theme = "alabaster"
html_theme_options = {"page_width": "1200px", "fixed_sidebar": True}

# GitHub would show a toctree as code. Every page is in this one, so that the index has only links.
TOCTREE = """
```{toctree}
:hidden:
:glob:
../README
*
../CONTRIBUTING
```
"""


def add_toctree(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == root_doc:
        source[0] += TOCTREE


def check_addresses(app: Sphinx, doctree: nodes.document) -> None:
    """Warn of addresses that cannot be right; nothing is fetched."""
    for link in doctree.findall(nodes.reference):
        address = link.get("refuri", "")
        parts = urlsplit(address)
        if parts.scheme and (parts.scheme != "https" or "." not in parts.netloc):
            logging.getLogger(__name__).warning("not an https address: %s", address, location=link)


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_toctree)
    app.connect("doctree-read", check_addresses)
