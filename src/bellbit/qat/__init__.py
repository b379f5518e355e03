"""Quantization while training (BBQ, arXiv 2603.01599, and its rivals)."""

from bellbit.qat.layers import QuantLinear, convert, prepare
from bellbit.quantizers import quantizer

__all__ = ["QuantLinear", "convert", "prepare", "quantizer"]
