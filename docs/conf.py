"""How Sphinx builds the documentation. Nothing here needs a network, nor do the pages."""

import os
import pathlib
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "_extensions")]

import gallery  # noqa: E402

import keras_avg  # noqa: E402

project = "keras_avg"
author = copyright = "the keras_avg contributors"
version = release = keras_avg.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
    "markdown_docstrings",
    "public_names",
    "mathml",
]
templates_path = ["_templates"]
exclude_patterns = ["_templates"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

highlight_language = "text"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand in the docstrings, under Args
autodoc_inherit_docstrings = False  # what a class only overrides is described where it comes from
napoleon_custom_sections = ["Reference"]
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"keras_avg {release}"
html_show_sphinx = False
html_theme_options = {
    "source_repository": "https://github.com/keras-avg/keras-avg/",
    "source_branch": "main",
    "source_directory": "docs/",
}

gallery.write_pages()
