"""Between HTTP and the core: chat template, tokenising, detokenising, stop strings, the core's client."""
