"""OpenAI's /v1/responses: translated to chats, with items as output and responses kept in memory."""
