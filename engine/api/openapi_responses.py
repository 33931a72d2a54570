"""JSON schemas of the responses."""

from typing import Any

Schema = dict[str, Any]
REFERENCE = "#/components/schemas/{name}"

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}


def ref(name: str) -> Schema:
    return {"$ref": REFERENCE.format(name=name)}


def listed(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def nullable(of: Schema) -> Schema:
    return {"anyOf": [of, NULL]}


def record(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with these fields, and possibly others."""
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


def completion(
    kind: str, choice: dict[str, Schema], of_choice: dict[str, Schema], optional: dict[str, Schema] | None = None
) -> Schema:
    """A response with choices; `of_choice` and `optional` are fields that a choice and the response may have."""
    head = {"id": STRING, "object": {"const": kind}, "created": COUNT, "model": STRING}
    return record(head | {"choices": listed(record(choice, of_choice)), "usage": ref("Usage")}, optional)


def pooled_list(item: dict[str, Schema]) -> Schema:
    """A response with one item for each text or pair."""
    head = {"id": STRING, "object": {"const": "list"}, "created": COUNT, "model": STRING}
    return record(head | {"data": listed(record({"index": COUNT} | item)), "usage": ref("PoolingUsage")})


VECTOR: Schema = {"anyOf": [listed(NUMBER), STRING]}  # base64 on request
FINISH_REASON: Schema = {"enum": ["stop", "length", "tool_calls", "abort", "error", None]}
STOP_REASON: Schema = {"type": ["string", "integer", "null"]}
# For each token of a prompt, a map from token ids; null for the first token.
PROMPT_LOGPROBS: Schema = listed(
    nullable(
        {"type": "object", "additionalProperties": record({"logprob": NUMBER, "rank": COUNT, "decoded_token": STRING})}
    )
)
ABOUT_PROMPT: dict[str, Schema] = {"prompt_logprobs": PROMPT_LOGPROBS, "prompt_token_ids": listed(COUNT)}

REPLICA: Schema = record({"replica": COUNT, "status": STRING}, {"process": INTEGER, "cause": STRING})

RESPONSES: dict[str, Schema] = {
    "Error": record(
        {
            "error": record(
                {"message": STRING, "type": STRING, "param": nullable(STRING), "code": {"type": ["string", "null"]}}
            )
        }
    ),
    "Usage": record(
        {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
        {
            "prompt_tokens_details": record({"cached_tokens": COUNT}),
            "completion_tokens_details": record({"reasoning_tokens": COUNT}),
        },
    ),
    "CompletionLogprobs": record(
        {
            "text_offset": listed(COUNT),
            "token_logprobs": listed(nullable(NUMBER)),
            "tokens": listed(STRING),
            "top_logprobs": listed(nullable({"type": "object", "additionalProperties": NUMBER})),
        }
    ),
    "Completion": completion(
        "text_completion",
        {
            "index": COUNT,
            "text": STRING,
            "logprobs": nullable(ref("CompletionLogprobs")),
            "finish_reason": FINISH_REASON,
        },
        {"stop_reason": STOP_REASON, "token_ids": listed(COUNT), **ABOUT_PROMPT},
    ),
    "ChatLogprob": record({"token": STRING, "logprob": NUMBER, "bytes": nullable(listed(COUNT))}),
    "ChatLogprobs": record(
        {
            "content": nullable(
                listed({"allOf": [ref("ChatLogprob"), record({"top_logprobs": listed(ref("ChatLogprob"))})]})
            )
        },
        {"refusal": NULL},
    ),
    "ToolCall": record(
        {
            "id": STRING,
            "type": {"const": "function"},
            "function": record({"name": STRING, "arguments": STRING | {"description": "A JSON object."}}),
        }
    ),
    "ChatCompletion": completion(
        "chat.completion",
        {
            "index": COUNT,
            "message": record(
                {"role": {"const": "assistant"}, "content": nullable(STRING)},
                {
                    "refusal": nullable(STRING),
                    "reasoning_content": nullable(STRING),
                    "tool_calls": listed(ref("ToolCall")),
                },
            ),
            "logprobs": nullable(ref("ChatLogprobs")),
            "finish_reason": FINISH_REASON,
        },
        {"stop_reason": STOP_REASON, "token_ids": listed(COUNT)},
        ABOUT_PROMPT | {"prompt_text": STRING},
    ),
    "EmbeddingList": pooled_list({"object": {"const": "embedding"}, "embedding": VECTOR}),
    "Pooled": pooled_list({"object": {"const": "pooling"}, "data": VECTOR}),
    "Classified": pooled_list({"label": nullable(STRING), "probs": listed(NUMBER), "num_classes": COUNT}),
    "ScoreList": pooled_list({"object": {"const": "score"}, "score": NUMBER}),
    "Reranked": record(
        {
            "id": STRING,
            "model": STRING,
            "results": listed(
                record({"index": COUNT, "relevance_score": NUMBER}, {"document": record({"text": STRING})})
            ),
            "usage": ref("PoolingUsage"),
        }
    ),
    "PoolingUsage": record(
        {"prompt_tokens": COUNT, "total_tokens": COUNT}, {"prompt_tokens_details": record({"cached_tokens": COUNT})}
    ),
    "Model": record(
        {"id": STRING, "object": {"const": "model"}, "created": COUNT, "owned_by": STRING},
        {"root": STRING, "parent": nullable(STRING), "max_model_len": COUNT, "vocab_size": COUNT},
    ),
    "ModelList": record({"object": {"const": "list"}, "data": listed(ref("Model"))}),
    "Tokenized": record(
        {"count": COUNT, "max_model_len": COUNT, "tokens": listed(COUNT)}, {"token_strs": nullable(listed(STRING))}
    ),
    "Detokenized": record({"prompt": STRING}),
    "PrefixCacheReset": record({"success": BOOLEAN, "forgotten_blocks": COUNT}),
    "Load": record({"server_load": COUNT}),
    "Anything": {"type": "object"},
    "Health": record(
        {
            "status": {"enum": ["ok", "degraded", "restarting", "hung", "dead"]},
            "running": COUNT,
            "waiting": COUNT,
            "last_step_age_s": nullable(NUMBER),
        },
        {
            "cause": STRING,
            "replicas": listed(REPLICA),
        },
    ),
    "Scaling": record(
        {
            "revision": COUNT,
            "data_parallel_size": COUNT,
            "done": BOOLEAN,
            "error": nullable(STRING),
            "timed_out": COUNT,
            "replicas": listed(REPLICA),
        }
    ),
    "Ready": record({"status": {"const": "ready"}}),
    "Version": record({"version": STRING}, {"simulated": STRING}),
    "Document": record({"openapi": STRING, "paths": {"type": "object"}}),
    "Text": STRING,
}
