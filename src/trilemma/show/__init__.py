"""What a model looks at: mixing matrices of its layers as pictures and one page."""

from trilemma.show.maps import Map, collect
from trilemma.show.page import write_page
from trilemma.show.reading import Reading, read

__all__ = ["Map", "Reading", "collect", "read", "write_page"]
