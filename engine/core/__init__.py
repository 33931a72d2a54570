"""The EngineCore: loop, scheduler, KV blocks, prefix cache. Imports no torch."""
