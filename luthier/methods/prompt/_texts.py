"""What prompts for the texts of a dual encoder share: texts are looked up at the site "words", before positions are added. A
model that classifies by names (luthier.tasks.dual.Named) says where in its texts the names stand."""

import torch
from torch import nn

from luthier.errors import DoesNotFit


def start(site, model, words, shape, std):
    """Context vectors: the embeddings of given words, or N(0, std²)."""
    if not words:
        return site.normal(*shape, std=std)
    ids = tokens(model, words)
    rows = site.module.weight.detach()[ids].clone()
    return nn.Parameter(rows.expand(*shape[:-2], *rows.shape).clone())


def tokens(model, text):
    """Ids of a text without the special tokens around it."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise DoesNotFit(f"{text!r} must be tokenised, and {type(model).__name__} brings no tokenizer. Open a class-names task, "
                         "or start from random vectors.")
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def order(site, model, n, middle):
    """(C, T'): for each text, once n vectors stand behind its start token, the places of start, context, name and rest; of a
    middle position, half the context comes behind the name. What the template puts before the name goes. {} where the model has
    no names."""
    spans = getattr(model, "spans", None)
    if spans is None:
        return {}
    first, width, half = int(site.stack.causal) or site.stack.fixed, model.texts.shape[1], n // 2 if middle else n
    if len({a for a, _ in spans}) > 1:
        raise DoesNotFit("The words before the names are not the same number of tokens for every class. Use another template.")
    rows = [[*range(first + half), *range(n + a, n + b), *range(first + half, first + n), *range(n + b, n + width)]
            for a, b in spans]
    return dict(order=site.fixed(torch.tensor(rows)))


def placed(t, P, p, copies=1):
    """The tokens with the context P, (n, D) or (rows, n, D), in its place."""
    t = t.insert(P, p.key)
    return t.keep(p.order[:len(t.h) // copies].repeat(copies, 1)) if hasattr(p, "order") else t
