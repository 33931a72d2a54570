"""Parts of a model that run in each step in addition to transformers' class."""
