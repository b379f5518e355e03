"""Kernels for packed weights. The backend is resolved here, once; `reference` is the oracle of the others."""

from bellbit.kernels.reference import linear

__all__ = ["linear"]
