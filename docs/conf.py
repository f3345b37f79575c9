"""The site: the documents as they are in the repository, and pages from the docstrings.

The source folder is the whole repository, so that a link between two documents is the same here
and on a file host. What is generated goes to docs/rules and docs/api, which git ignores.
"""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import adaptive_opt  # noqa: E402
from docs.pages import api, rules  # noqa: E402

project = "adaptive_opt"
author = "the adaptive_opt authors"
version = release = adaptive_opt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "docs/rules/*", "docs/api/*"),
    *("examples/CHOOSING.md", "examples/gallery/README.md", "benchmarks/README.md"),
    "benchmarks/results/**.md",
]
exclude_patterns = [".*", "build", "dist"]

myst_heading_anchors = 4  # so that page.md#a-heading is a link, as on a file host
myst_enable_extensions = ["attrs_inline"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say it in words, with ranges and units
autodoc_preserve_defaults = True
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

html_theme = "sphinx_book_theme"
html_title = "adaptive_opt"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "navbar_persistent": [],  # the sidebar has a field for searching
}


def _generated(app: object) -> None:
    api.write(ROOT / "docs" / "api")
    rules.write(ROOT / "docs" / "rules")


def _result(app: object, document: str, source: list[str]) -> None:
    """A table that a benchmark has written is a page of its own, which only links lead to."""
    if document.startswith("benchmarks/results/"):
        source[0] = f"---\norphan: true\n---\n\n# {document}\n\n{source[0]}"


def _first_page(app, error) -> None:
    """The address of the folder itself leads to the first page."""
    if error is None:
        there = f"{root_doc}.html"
        pathlib.Path(app.outdir, "index.html").write_text(
            f'<!DOCTYPE html><meta charset="utf-8"><title>{html_title}</title>'
            f'<meta http-equiv="refresh" content="0; url={there}"><a href="{there}">{there}</a>\n'
        )


def setup(app) -> None:
    app.connect("builder-inited", _generated)
    app.connect("build-finished", _first_page)
    app.connect("source-read", _result)
    app.connect("autodoc-process-docstring", api.linked, priority=400)  # before napoleon
