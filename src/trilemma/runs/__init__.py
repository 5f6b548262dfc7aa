"""The run directory: publish protocol, manifests, checkpoints, locks, and loading a trained model."""

from trilemma.runs.directory import RunDirectory as RunDirectory

__all__ = ["RunDirectory"]
