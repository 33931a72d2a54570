"""Between HTTP and the core: chat templates, tokenizing, detokenizing, stop strings, the client of the core."""
