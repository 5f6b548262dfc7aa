"""Models of other libraries, in and out: Hugging Face directories and exports."""

from trilemma.interop.importing import import_model

__all__ = ["import_model"]
