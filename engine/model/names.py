"""Files that say what a model is: transformers' and Mistral's own."""

CONFIG = "config.json"
PARAMS = "params.json"
