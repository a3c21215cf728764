"""Multi-scale alignment (MSA) for remote sensing image-text retrieval, as a plugin for open_clip."""
