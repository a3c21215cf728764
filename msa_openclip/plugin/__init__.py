"""All contact with open_clip's internals."""
