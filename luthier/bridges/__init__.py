"""Bridges between a vision model (or an audio encoder) and a language model: one small file a published way. Ways that make a
dual encoder of two encoders, such as sail, are told in dual.py.

    model = luthier.bridge("dinov2-s", "smollm2-135m", "limber()")      # in text: dinov2-s+smollm2-135m:limber()
    tuned = luthier.attach(model, 'full(at="connector") >> lora(at="text.attn.q text.attn.v")')

A way is declared like a method: frozen hyperparameters and verbs, in a file of its name. The first `hidden` of an image's prompt
tokens are masked wherever `within` does not show them. Its verbs:

    states(seen)                  which vision states, Seen -> (N, ...) for N images: what may be computed once and kept
    connector(fit)                the nn.Module that trains, for the widths that `fit` names
    prompt(connector, states)     (N, ...) -> (N, T, D) tokens in front of the text; where `heeds` is True it is given the
                                  instruction, too: its words' embeddings (N, L, D) and their mask (N, L)
    within(run)                   a context in which the language model runs with images: its blocks may be hooked; see way.Run
    loss(model, front, labels, words)        a training term beside the text's own loss: front are the prompts of every row,
                                  (B, N T, D), labels its learned tokens (IGNORE elsewhere), words how often each stands in the
                                  training responses (None where nobody counted)
"""

import functools
import importlib
import pkgutil

from ..errors import UnknownName, nearest
from ..method import declared, tree
from .model import Bridged, bridge
from .way import DEFAULT, WAYS, Fit, Seen, Way, way

__all__ = ["DEFAULT", "Bridged", "Fit", "Seen", "Way", "bridge", "discover", "parse", "way"]


@functools.cache
def discover():
    """name -> Way, of every file here."""
    for file in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{file.name}")
    return WAYS


def parse(text):
    """`"limber(tokens=4)"` -> Way. Literals only: nothing in the text is ever executed."""
    return text if isinstance(text, Way) else declared(tree(text), text, _lookup)


def _lookup(name):
    if name not in discover():
        raise UnknownName(f"No bridge is named {name!r}. {nearest(name, WAYS)}")
    return WAYS[name]
