"""Parameter-free scores of every image against every text at every scale."""
