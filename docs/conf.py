"""The documentation: Sphinx, pages in Markdown, the API from docstrings. `make docs` builds it with warnings as errors."""

import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

import lightning_lora
import lightning_lora.data
import lightning_lora.estimate
import lightning_lora.tasks

project = "lightning-lora"
author = "the lightning-lora authors"
copyright = "the lightning-lora authors, Apache-2.0"
version = release = lightning_lora.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
# A reference to a public name has to be found. Others are to torch, Lightning and files of this package, which have no page here.
nitpicky = True
nitpick_ignore_regex = [("py:mod", ".*"), ("py:.*", rf"(?!(.*\.)?({'|'.join(lightning_lora.__all__)})$).*")]

# Pages. A link to a heading is checked as one to a page is.
myst_heading_anchors = 4

# The API. Members are listed on the page where they are named; what a class inherits is its parent's.
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
default_role = "code"
toc_object_entries_show_parents = "hide"

# Everything a page needs lies beside it: no fonts, scripts or styles from elsewhere; search works from files too.
html_theme = "pydata_sphinx_theme"
html_title = f"lightning-lora {release}"
templates_path = ["_templates"]
html_sidebars = {"**": ["pages"]}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_center": [],
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "search_as_you_type": True,
}

# Public name → its full name.
PUBLIC = {
    name: f"{module.__name__}.{name}"
    for module in (lightning_lora.estimate, lightning_lora.data, lightning_lora.tasks, lightning_lora)
    for name in module.__all__
}


def link_public_names(app: Sphinx, page: nodes.document) -> None:
    """Link code in the text that is a public name, or a call of one, to its place in the reference."""
    for literal in list(page.findall(nodes.literal)):
        name = re.match(r"(\w+)(?:\(|$)", literal.astext())
        if name and name[1] in PUBLIC and isinstance(literal.parent, (nodes.paragraph, nodes.entry, nodes.term)):
            link = pending_xref("", refdomain="py", reftype="obj", reftarget=PUBLIC[name[1]], refexplicit=True)
            literal.replace_self(link)
            link += literal


def keep_units(app: Sphinx, page: nodes.document) -> None:
    """Let no line end between a number and its unit."""
    for text in list(page.findall(nodes.Text)):
        if not isinstance(text.parent, (nodes.literal, nodes.literal_block)):
            kept = re.sub(r"(?<=\d) (?=(%|[GMk]i?B|ms|µs|s|min)(?![\w/]))", "\N{NO-BREAK SPACE}", text)
            text.parent.replace(text, nodes.Text(kept))


def setup(app: Sphinx) -> None:
    """Sphinx calls this when it has read the file."""
    app.connect("doctree-read", link_public_names)
    app.connect("doctree-read", keep_units)
