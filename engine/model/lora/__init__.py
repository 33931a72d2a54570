"""LoRA adapters: reading and sharding their weights, and adding them in both model backends."""
