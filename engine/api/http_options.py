"""The configuration of the API processes of a server: limits of requests, keys, origins."""

import msgspec

from engine.frontend.parsing.names import AUTO
from engine.media.limits import MediaOptions

ANTHROPIC_PATH = "/v1/messages"  # and all below it
TEXT_BODY = 32 << 20  # bytes
MEDIA_BODY = 128 << 20  # base64 takes four bytes for three, and a prompt may have several images


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a request. The error of a request that exceeds one names the flag that raises it."""

    max_body_bytes: int | None = None  # None: TEXT_BODY or MEDIA_BODY
    # Decoding a million values holds the GIL, and so stops all streams of the process, for less than 100 ms.
    max_body_values: int = 1 << 20
    max_prompts: int = 1024  # of one body
    max_prompt_bytes: int | None = None  # None: --max-model-len times the longest token
    max_n: int = 128
    max_stop: int = 64
    max_stop_token_ids: int = 1024
    max_queue: int | None = None  # waiting requests; None: no limit
    max_requests_per_key: int | None = None  # of one API key at once; None: no limit
    max_stored_responses: int = 1000  # of an API process, for requests that name one
    max_stored_bytes: int = 64 << 20  # of these responses and their conversations
    request_timeout: float | None = None  # seconds from arrival to the end of the answer; None: no limit

    def largest_body(self, *, takes_media: bool) -> int:
        """The most bytes of a body, of a model that takes images, audio or video, or texts only."""
        if self.max_body_bytes is not None:
            return self.max_body_bytes
        return MEDIA_BODY if takes_media else TEXT_BODY


class HttpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the HTTP server."""

    api_keys: tuple[str, ...] = ()  # a request must have one of them; empty: no key is needed
    allowed_origins: tuple[str, ...] = ()  # of web pages that may call the server; "*": any
    root_path: str = ""  # prefix of a reverse proxy, "/path"
    ssl_certfile: str | None = None  # enables HTTPS
    ssl_keyfile: str | None = None  # None: the key is in the certificate's file
    page: bool = True  # whether `/` and `/docs` are pages for people
    runtime_lora: bool = False  # whether clients may load and unload adapters
    trust_request_chat_template: bool = False  # whether templates sent in requests are run
    tool_call_parser: str = AUTO  # the form of tool calls; AUTO: what the chat template says
    reasoning_parser: str = AUTO  # the form of reasoning
    limits: Limits = Limits()
    media: MediaOptions = MediaOptions()  # of multimodal inputs
