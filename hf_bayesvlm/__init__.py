"""Uncertainty for CLIP and SigLIP: a Laplace posterior after the fact (arXiv:2412.06014)."""

from ._version import __version__

__all__ = ["__version__"]
