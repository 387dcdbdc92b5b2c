"""knnmoe: deploy Mixture-of-Experts models with routing that adapts by retrieval."""

__version__ = "0.1.0"
