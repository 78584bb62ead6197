"""The documentation: Sphinx, pages in Markdown, the API from docstrings. `make docs` builds it with warnings as errors."""

import lightning_lora

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
myst_enable_extensions = ["colon_fence"]

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
