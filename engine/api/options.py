"""What one API process is configured with: limits of requests, keys, origins; the same for all of a server."""

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one request may ask for at most; beyond that it is refused, with the flag named that raises the limit."""

    max_body_bytes: int = 32 << 20
    # Decoding a million values holds the interpreter, and so all streams of the process, for less than 100 ms.
    max_body_values: int = 1 << 20
    max_prompts: int = 1024  # of one body
    max_prompt_bytes: int | None = None  # None: --max-model-len times the longest token
    max_n: int = 128
    max_stop: int = 64
    max_stop_token_ids: int = 1024
    max_queue: int | None = None  # requests that wait; None: no limit


class HttpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the HTTP side answers."""

    api_keys: tuple[str, ...] = ()  # one of them must come with a request; none: all are answered
    allowed_origins: tuple[str, ...] = ()  # of web pages that may call the server; "*": any
    root_path: str = ""  # under which a proxy shows the server, "/path"
    ssl_certfile: str | None = None  # with it the server speaks HTTPS
    ssl_keyfile: str | None = None  # None: the key is in the certificate's file
    runtime_lora: bool = False  # whether adapters may be loaded and unloaded over HTTP
    trust_request_chat_template: bool = False  # whether the templates that requests bring along are run
    limits: Limits = Limits()
