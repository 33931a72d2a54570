"""Names of the parsers; those of vLLM."""

AUTO, NONE = "auto", "none"
TOOL_PARSERS = ("hermes", "llama3_json", "mistral", "qwen3_coder", "pythonic", "openai")
REASONING_PARSERS = ("deepseek_r1", "qwen3", "mistral", "openai_gptoss")
