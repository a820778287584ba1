"""Settings of the documentation: ``python -m sphinx -W --keep-going docs docs/_build``."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from vision_ssm import __version__  # noqa: E402

project = "vision_ssm"
author = "the authors of vision_ssm"
project_copyright = "the authors of vision_ssm, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "requirements.txt"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "literal"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes stand in a table, not as entries that the members repeat

html_theme = "furo"
html_title = f"vision_ssm {version}"
html_show_sourcelink = False
