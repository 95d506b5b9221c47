"""How a way of bridging is declared, and what its verbs are given."""

import dataclasses

import torch

from ..errors import BadChain
from ..method import Declared

WAYS = {}                               # name -> Way subclass


class Way(Declared):
    layers = False                      # whether states() reads the states of every layer

    def prompt(self, connector, states):
        return connector(states)


def way(cls):
    """Register a way under its file's own name."""
    if cls.__name__ != (home := cls.__module__.rsplit(".", 1)[-1]) and cls.__module__ != "__main__":
        raise BadChain(f"{cls.__module__} must define a way named after the file, {home!r}, not {cls.__name__!r}.")
    return WAYS.setdefault(cls.__name__, dataclasses.dataclass(frozen=True, repr=False)(cls))


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a vision model makes of N images."""
    tokens: torch.Tensor                # (N, S, d) the last states but special tokens; S = 1 of an encoder that gives a vector
    summary: torch.Tensor               # (N, d) the class token's, or the mean where there is none
    layers: tuple = ()                  # where asked for: (N, fixed + S, d) after each layer, the embedding first
    fixed: int = 0                      # leading special tokens


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a connector must fit."""
    states: tuple                       # the shape of one image's states
    width: int                          # D, of the language model's embeddings
    language: torch.nn.Module
