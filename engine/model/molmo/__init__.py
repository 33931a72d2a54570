"""Molmo's first generation (Molmo-72B-0924, Molmo-7B-D-0924), which transformers has no class for."""

MODEL_TYPE = "molmo"
