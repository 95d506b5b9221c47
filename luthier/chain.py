"""The text of chains, under the name people look for it."""

from .method import Chain, parse, split

__all__ = ["Chain", "parse", "split"]
