"""Which words and which parts of an image make up a score."""
