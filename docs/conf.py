"""The site: sphinx-build -W --keep-going -b html docs docs/_build/html."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import shutil
from pathlib import Path

REPOSITORY = "https://github.com/jaxbn/jaxbn"
RAW = "https://raw.githubusercontent.com/jaxbn/jaxbn/main"
SITE = "https://jaxbn.readthedocs.io/en/latest"

project = "jaxbn"
author = "the jaxbn authors"
copyright = "the jaxbn authors"
release = importlib.metadata.version("jaxbn")
version = release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "performance_tables.md"]

# Links: a dead one is a warning, and warnings are errors.
nitpicky = True
# Types in signatures are those of JAX, NumPy and Flax, whose pages are not here.
nitpick_ignore_regex = [("py:.*", r"(?!jaxbn).*"), ("py:.*", r"jaxbn\.(_|convert\._).*")]
default_role = "py:obj"
myst_heading_anchors = 4
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]

# Notebooks run at every build, and an error ends it.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_render_image_options = {"align": "center"}

# API: the signatures, and all that the docstrings hold.
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_display_short_literal_types = True
toc_object_entries_show_parents = "hide"
add_module_names = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "jaxbn"
html_static_path = ["_static"]
html_css_files = ["jaxbn.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "source_repository": f"{REPOSITORY}/",
    "source_branch": "main",
    "source_directory": "docs/",
    "top_of_page_buttons": ["view", "edit"],
}

# A copy of MathJax that a Python package brings, so that pages need no network.
mathjax_path = "mathjax/tex-chtml.js"
MATHJAX = ("tex-chtml.js", "output/chtml/fonts")


def setup(app):
    app.connect("build-finished", copy_mathjax)
    app.connect("source-read", localize)
    app.connect("include-read", localize_included)
    app.connect("viewcode-follow-imported", defining_module)
    app.connect("autodoc-process-signature", plain_defaults)
    # Before napoleon reads the sections.
    app.connect("autodoc-process-docstring", fields_as_parameters, priority=100)


def copy_mathjax(app, error):
    """Puts the files of MathJax that pages ask for beside the other static files."""
    if error is not None or app.builder.format != "html":
        return
    files = importlib.metadata.files("sphinx-mathjax-offline") or []
    for file in files:
        _, _, name = str(file).partition("static/mathjax/")
        if name.startswith(MATHJAX):
            target = Path(app.outdir, "_static", "mathjax", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.locate(), target)


def localize(app, docname, source):
    """Turns links that work on GitHub and on a package index into links within the site."""
    text = source[0].replace("](../", f"]({REPOSITORY}/blob/main/")
    for page in app.env.found_docs:
        file = Path(app.env.doc2path(page)).name
        text = text.replace(f"]({SITE}/{page}.html", f"]({file}")
    # Doctests end with an empty line that is not to be seen.
    text = re.sub(r"^(```python\n>>>.*?)\n+```$", r"\1\n```", text, flags=re.S | re.M)
    source[0] = text.replace(f"]({RAW}/docs/", "](")


def localize_included(app, path, docname, source):
    """The same for README.zh-CN.md, which a page includes."""
    localize(app, docname, source)


def defining_module(app, module, attribute):
    """Returns the module that holds the code of a public name, for its source link.

    `__module__` of a public class or function is the package that exports it.
    """
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == attribute.split(".")[0]:
                    return node.module
    return module


def plain_defaults(app, what, name, obj, options, signature, returned):
    """Returns the signature with defaults by their names, as they are written."""
    if signature is not None:
        signature = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", signature)
        signature = re.sub(r"<function (?:[\w.]+\.)?(\w+) at 0x\w+>", r"\1", signature)
    return signature, returned


def fields_as_parameters(app, what, name, obj, options, lines):
    """Shows the fields of a value as the arguments that they are when it is made."""
    if what == "class" and not getattr(obj, "_is_protocol", False):
        lines[:] = ["Args:" if line == "Attributes:" else line for line in lines]
