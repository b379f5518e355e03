"""Quantization after training: walks a model block by block."""
