"""Links each `name` in code type to the page of the public symbol that it names.

So pages stay plain Markdown: `SWA`, `keras_avg.SWA` and `callbacks.SwapAverageWeights` are links.
"""

import inspect
import re

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

import keras_avg


def public_symbols():
    """Full name of each public symbol, by every name that is used for it on a page."""
    modules = [keras_avg, *(m for _, m in inspect.getmembers(keras_avg, inspect.ismodule))]
    found = {}
    for module in modules:
        for name in getattr(module, "__all__", ()):
            if not inspect.ismodule(getattr(module, name)):
                full = f"{module.__name__}.{name}"
                found |= {full: full, full.removeprefix("keras_avg."): full, name: full}
    return found


class LinkPublicNames(SphinxTransform):
    """Makes references of literals that name a public symbol."""

    default_priority = 500

    def apply(self):
        names = public_symbols()
        for literal in list(self.document.findall(nodes.literal)):
            target = names.get(re.sub(r"\(.*\)$", "", literal.astext()))
            if target is None or self.env.docname.endswith(f"/{target}"):
                continue
            if isinstance(literal.parent, (nodes.title, nodes.reference, pending_xref)):
                continue
            reference = pending_xref(
                "", refdomain="py", reftype="obj", reftarget=target, refexplicit=True
            )
            literal.replace_self(reference)
            reference += literal


def setup(app):
    app.add_transform(LinkPublicNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
