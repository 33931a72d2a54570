"""Finding, loading and adapting models."""
