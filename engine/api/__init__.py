"""The front-end process's HTTP side: OpenAI protocol, SSE, errors, metrics."""
