"""Parts of a model that run in each step beside the class of transformers."""
