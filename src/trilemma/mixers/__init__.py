"""Token mixers: one file each. Adding a file here, or giving one with --plugin, is all it takes to add a mixer."""
