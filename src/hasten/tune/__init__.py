"""Predict, try, choose, and write what was chosen."""

from hasten.tune.run import tune

__all__ = ["tune"]
