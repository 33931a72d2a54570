"""Anthropic's /v1/messages: translated to chats, with blocks as output."""
