"""Quantization of one linear group: number formats, objective, equalization, search, rounding."""
