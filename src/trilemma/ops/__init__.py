"""Operators: each with a naive reference and a vectorised plain-PyTorch form."""
