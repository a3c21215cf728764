"""The model configurations of msa_openclip, one JSON file a model."""
