"""Names of the parsers; those of vLLM."""

AUTO, NONE = "auto", "none"
TOOL_PARSERS = ("hermes", "llama3_json", "mistral")
REASONING_PARSERS = ("deepseek_r1", "qwen3", "mistral")
