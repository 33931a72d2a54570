"""The HTTP API: OpenAI protocol, server-sent events, errors, metrics, API processes."""
