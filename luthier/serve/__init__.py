"""Serving: many tuned states over one base that nobody writes."""

from .rack import Rack

__all__ = ["Rack"]
