"""Training: models of one's own, where there are no weights to explain."""

from xai_core.training.classifier import Recipe, accuracy, train_classifier

__all__ = ["Recipe", "accuracy", "train_classifier"]
