"""Quantization while training (BBQ, arXiv 2603.01599, and its rivals)."""

from bellbit.qat.quantizers import quantizer

__all__ = ["quantizer"]
