"""Reads and checks what describes a model: config.json, or params.json of Mistral's format."""
