"""How the documentation is built: Markdown pages, and a reference generated from the code at each build."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import generate

project = "Confide"
author = "The Confide developers"
copyright = "The Confide developers"
version = release = importlib.metadata.version("confide")

extensions = ["myst_parser"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

smartquotes = False  # an option is spelled --json, also in the text

html_theme = "furo"
html_title = f"Confide {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False


def setup(app):
    app.connect(
        "config-inited",
        lambda app, config: generate.write_reference(Path(app.srcdir) / "reference" / "generated"),
    )
