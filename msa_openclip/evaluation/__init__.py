"""Models as scorers, and the retrieval and classification metrics of the field."""
