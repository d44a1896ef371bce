"""Offline changes to weights, as a recipe says."""

from hasten.compress.folder import compress

__all__ = ["compress"]
