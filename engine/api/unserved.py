"""Fields of other servers and of later versions of the API that this server does not implement.

A field that would change the output is refused with its name, so that no client gets another output than it asked for.
Other fields (bookkeeping, hints on speed) are accepted. An unknown field is accepted and logged once.
"""

import difflib
import logging
from typing import Any

import msgspec

from engine.errors import RequestError

log = logging.getLogger("redline.api")

# Besides null, values that ask for nothing. They are accepted for every field.
EMPTY: tuple[Any, ...] = (False, "", [], {}, 0)

# Fields that would change the output, with the values that ask for what happens anyway.
REFUSED: dict[str, tuple[Any, ...]] = {
    # structured output
    **dict.fromkeys(
        (
            "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_whitespace_pattern",
            "structured_outputs", "structural_tag", "json_schema", "regex", "ebnf", "grammar",
        ),
        EMPTY,
    ),
    "response_format": (*EMPTY, {"type": "text"}),
    # tools, in the older form
    "functions": EMPTY,
    "function_call": (*EMPTY, "none"),
    # other kinds of input and output
    "audio": EMPTY,
    "modalities": (*EMPTY, ["text"]),
    "prompt_embeds": EMPTY,
    "mm_processor_kwargs": EMPTY,
    "web_search_options": EMPTY,
    "verbosity": (*EMPTY, "medium"),
    "include_reasoning": (True,),
    "separate_reasoning": (True, False),
    "thinking_token_budget": EMPTY,
    "thinking": EMPTY,
    "enable_thinking": (),
    # beam search
    "use_beam_search": EMPTY,
    "num_beams": (1,),
    "length_penalty": (1, 1.0),
    "early_stopping": EMPTY,
    # samplers of other servers
    "logits_processors": EMPTY,
    "logits_processor_pattern": EMPTY,
    "custom_logit_processor": EMPTY,
    "custom_params": EMPTY,
    "vllm_xargs": EMPTY,
    "logprob_token_ids": EMPTY,
    "do_sample": (True,),
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "top_a": EMPTY,
    "epsilon_cutoff": EMPTY,
    "eta_cutoff": EMPTY,
    "penalty_alpha": EMPTY,
    "no_repeat_ngram_size": EMPTY,
    "repetition_detection": EMPTY,
    "mirostat": EMPTY,
    "mirostat_mode": EMPTY,
    "dynatemp_range": EMPTY,
    "smoothing_factor": EMPTY,
    "xtc_probability": EMPTY,
    "dry_multiplier": EMPTY,
    # other servers' names of fields that this one has
    "repeat_penalty": (1, 1.0),
    "max_new_tokens": (),
    "min_new_tokens": EMPTY,
    "n_predict": (-1,),
    "num_predict": (-1,),
    "stop_sequences": EMPTY,
    "stop_regex": EMPTY,
    "system": EMPTY,
    "lora_path": EMPTY,
    # transfer of KV caches, sessions
    "kv_transfer_params": EMPTY,
    "session_params": EMPTY,
    # fields of one endpoint that were sent to the other
    "suffix": EMPTY,
    "best_of": (1,),
    "echo": EMPTY,
    "messages": EMPTY,
    "prompt": EMPTY,
    "tools": EMPTY,
    "tool_choice": (*EMPTY, "none"),
    "logprobs": EMPTY,
    "top_logprobs": EMPTY,
    "max_completion_tokens": (),
    "documents": EMPTY,
    "chat_template": EMPTY,
    "chat_template_kwargs": EMPTY,
    "continue_final_message": EMPTY,
    "reasoning_effort": ("none",),
}  # fmt: skip

INSTEAD = {
    "repeat_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "stop_sequences": "stop",
    "lora_path": "model",
    "enable_thinking": "chat_template_kwargs",
    "thinking": "chat_template_kwargs",
    "functions": "tools",
    "function_call": "tool_choice",
    "do_sample": "temperature",
}

# A name similar to one of these is refused: it is probably misspelled, and would change the output.
SPELLING_CHECKED = (
    "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stream", "stream_options", "logprobs",
    "top_logprobs", "bad_words", "allowed_token_ids", "truncate_prompt_tokens", "prompt_logprobs", "response_format",
    "chat_template_kwargs", "add_generation_prompt", "max_completion_tokens", "tool_choice", "messages", "prompt",
    "tools", "ignore_eos",
)  # fmt: skip

# Fields that do not change the output.
ACCEPTED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "prediction", "parallel_tool_calls", "request_id", "rid", "guided_decoding_backend",
    "spaces_between_special_tokens", "moderation", "data_parallel_rank", "timeout", "extra_headers",
})  # fmt: skip

MAX_NAMES = 200  # bounds the log if a client invents names
_seen: set[str] = set()


def check_unknown_fields(given: dict[str, msgspec.Raw]) -> None:
    """Refuse, accept or log the fields of a body that its struct does not have.

    `given` has their values as raw JSON. RequestError, with the name, if a field would change the output.
    """
    for name, raw in given.items():
        if name in ACCEPTED or bytes(raw).strip() == b"null":
            continue
        if name in REFUSED or name in SPELLING_CHECKED:
            if not is_one_of(msgspec.json.decode(raw), REFUSED.get(name, EMPTY)):
                raise RequestError(f"{name} is not supported here{_hint(name)}", name)
        elif close := difflib.get_close_matches(name, SPELLING_CHECKED, 1, 0.85):
            raise RequestError(f"{name} is not a field of this API: did you mean {close[0]}?", name)
        elif name not in _seen and len(_seen) < MAX_NAMES:
            _seen.add(name)
            log.warning("a request has the field %.100r, which is unknown and ignored", name)


def is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether a value is among others of the same type: 0 is not False here."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def _hint(name: str) -> str:
    return f": use {INSTEAD[name]}" if name in INSTEAD else ""
