"""How a way of bridging is declared, and what its verbs are given."""

import dataclasses

import torch

from ..errors import BadChain
from ..method import Declared

WAYS = {}                               # name -> Way subclass
DEFAULT = "limber()"


class Way(Declared):
    makes = "image-text"                # a model that writes about images; "audio-text": about sounds; "vision-language": a dual
                                        # encoder, as TwoHeads
    sees = ("vision", "vision-language", "other")                   # the kinds of models that may look (or listen),
    language = ("text-decoder", "text-pair", "other")               # and that may write
    layers = False                      # whether states() reads the states of every layer
    embedded = False                    # whether it reads what enters the first block, and the vision model stops there
    hidden = 0                          # of each image's prompt tokens: so many are masked

    heeds = False                       # whether prompt() is given the instruction, too: embeddings (N, L, D) and mask (N, L)

    def prompt(self, connector, states, *instruction):
        return connector(states, *instruction)


class TwoHeads(Way):
    """A way to make a dual encoder of two encoders; its verbs are told in dual.py."""
    makes = "vision-language"
    language = ("text-encoder", "text-decoder", "text-pair", "other")


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
    layers: tuple = ()                  # where asked for: (N, fixed + S, d) after each block, normed as the last is
    fixed: int = 0                      # leading special tokens


@dataclasses.dataclass(frozen=True)
class Heard:
    """What a language model makes of N texts."""
    tokens: torch.Tensor                # (N, L, d) the last states
    mask: torch.Tensor                  # (N, L)
    summary: torch.Tensor               # (N, d) the sentence's: the model's own kind of pooling


@dataclasses.dataclass
class Run:
    """What `within` sees of one run of the language model: front tokens stand at places offset + 0 ... N T."""
    model: torch.nn.Module
    states: torch.Tensor                # (B, N, ...)
    shown: torch.Tensor                 # (B, N)
    front: torch.Tensor                 # (B, N T, D)
    filling: bool = True                # whether the running forward reads the images, not only what follows them in a cache
    inside: bool = False                # whether the language model runs within the way now
    made: object = None                 # what the way made of the states, kept for blocks that run once more

    @property
    def offset(self):
        """How many tokens the methods on the model put before all others."""
        from ..host import Host

        host = Host.of(self.model)
        port = host and host.run(self.model.pen)
        return port.length() if port else 0


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a connector must fit."""
    states: tuple                       # the shape of one image's states
    width: int                          # D, of the language model's embeddings; of a dual encoder d, of its texts' states
    language: torch.nn.Module
    pen: object = None                  # its Stack
