"""Measuring: quality metrics with signatures, cost of decoding and training."""
