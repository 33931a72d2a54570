"""Fields of other servers and of later versions of the API that this server does not implement.

A request with a field that would change the output is rejected with the field's name, so that no client gets another
output than it requested. Other fields (bookkeeping, hints on speed) are accepted. An unknown one is logged once.
"""

import difflib
import logging
from typing import Any

import msgspec

from engine.errors import RequestError

log = logging.getLogger("redline.api")

# Besides null, values that have no effect. They are accepted for most fields.
EMPTY: tuple[Any, ...] = (False, "", [], {}, 0)

# Fields that would change the output, with the values for which the output is the same as without the field.
REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            # structured output
            "structural_tag", "json_schema", "regex", "ebnf", "grammar", "guided_json_object",
            # tools in the older form, and other kinds of input and output
            "functions", "audio", "prompt_embeds", "mm_processor_kwargs", "web_search_options", "thinking",
            "media_io_kwargs", "watermarking",
            # beam search and samplers of other servers
            "use_beam_search", "early_stopping", "logits_processors", "logits_processor_pattern",
            "custom_logit_processor", "custom_params", "vllm_xargs", "logprob_token_ids", "top_a", "epsilon_cutoff",
            "eta_cutoff", "penalty_alpha", "no_repeat_ngram_size", "repetition_detection", "mirostat", "mirostat_mode",
            "dynatemp_range", "smoothing_factor", "xtc_probability", "dry_multiplier",
            # other servers' names of fields that this one has
            "min_new_tokens", "stop_sequences", "stop_regex", "system", "lora_path",
            # transfer of KV caches, sessions
            "kv_transfer_params", "ec_transfer_params", "session_params",
            # of OpenAI's responses
            "instruction", "background", "conversation", "context_management", "previous_input_messages",
            # fields of one endpoint that were sent to the other
            "suffix", "messages", "prompt", "tools", "logprobs", "top_logprobs", "documents", "chat_template",
            "chat_template_kwargs", "continue_final_message",
        ),
        EMPTY,
    ),
    "function_call": (*EMPTY, "none"),
    "modalities": (*EMPTY, ["text"]),
    "verbosity": (*EMPTY, "medium"),
    "padding": ("do_not_pad",),
    "include_reasoning": (True,),
    "separate_reasoning": (True, False),
    "enable_thinking": (),
    "thinking_token_budget": (),
    "num_beams": (1,),
    "length_penalty": (1, 1.0),
    "do_sample": (True,),
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "repeat_penalty": (1, 1.0),
    "max_new_tokens": (),
    "n_predict": (-1,),
    "num_predict": (-1,),
    "best_of": (1,),
    "tool_choice": (*EMPTY, "none"),
    "max_completion_tokens": (),
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
    "json_schema": "structured_outputs",
    "regex": "structured_outputs",
    "ebnf": "structured_outputs",
    "grammar": "structured_outputs",
    "structural_tag": "structured_outputs",
    "guided_json_object": "structured_outputs",
    "enable_thinking": "chat_template_kwargs",
    "thinking": "chat_template_kwargs",
    "functions": "tools",
    "function_call": "tool_choice",
    "do_sample": "temperature",
}

# A name similar to one of these is rejected: it is probably misspelled, and would change the output.
SPELLING_CHECKED = (
    "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "stream", "stream_options", "logprobs",
    "top_logprobs", "bad_words", "allowed_token_ids", "truncate_prompt_tokens", "prompt_logprobs", "response_format",
    "chat_template_kwargs", "add_generation_prompt", "max_completion_tokens", "tool_choice", "messages", "prompt",
    "tools", "ignore_eos", "dimensions",
)  # fmt: skip

# Fields that do not change the output.
ACCEPTED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "prediction", "parallel_tool_calls", "rid", "session_id", "guided_decoding_backend",
    "spaces_between_special_tokens", "moderation", "data_parallel_rank", "timeout", "extra_headers", "stream_interval",
    "return_token_offsets", "return_mm_kwargs", "routed_experts_prompt_start",
})  # fmt: skip

MAX_NAMES = 200  # bounds the log if a client invents names
_seen: set[str] = set()


def check_unknown_fields(given: dict[str, msgspec.Raw]) -> None:
    """Reject, accept or log the fields of a body that its struct does not have.

    `given` has their values as raw JSON. Raises RequestError, with the name, if a field would change the output.
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
