"""KV-cache methods from the literature as short files over kvk's public ops; each gives a cache for transformers."""
