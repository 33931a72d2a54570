"""Trains the vision tower and the connector of `smollm2-135m-vision`: `make train-vision`."""
