"""Models in and out: the formats that people already use."""
