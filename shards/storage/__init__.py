"""Files and tars wherever they lie: local, fsspec URLs."""
