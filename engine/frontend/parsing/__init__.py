"""Reads the text of an answer: reasoning, content and tool calls, as the text arrives."""
