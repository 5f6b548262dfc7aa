"""Ours against the neighbours: `python -m benchmarks`, and each file as a script. See README.md."""
