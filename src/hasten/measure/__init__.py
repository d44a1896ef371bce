"""Speed, quality, memory and energy of models, with their spread."""

from hasten.measure.evaluate import evaluate

__all__ = ["evaluate"]
