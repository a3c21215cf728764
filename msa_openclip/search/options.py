"""What can be asked of an index and of a search; imports nothing heavy, for the command line."""

SEGMENT_IMAGES = 4096
"""Images a segment of an index, the unit in which an interrupted build goes on."""
KINDS = ("auto", "flat", "ivfpq", "hnsw")
"""Ways to find the nearest by global features, see `nearest.nearest`."""
CANDIDATES = 256
"""K: how many of the nearest by global features are scored by MSCMAT."""
FORMATS = ("table", "json", "geojson", "stac")
"""How answers are printed, see `results`."""
