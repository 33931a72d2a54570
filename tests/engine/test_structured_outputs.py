"""Outputs of random weights conform to what their requests ask for, whatever else runs."""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest

from engine.core.grammar_compiler import GrammarCompiler
from engine.errors import RequestError
from engine.frontend.grammar_vocabulary import GrammarVocabulary
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.grammar import Grammar, TokenMasks, encode_masks
from redline import LLM, SamplingParams, StructuredOutputs
from tests.tiny import write_tiny

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FREE = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
THINKS = "{% for message in messages %}{{ message.content }}{% endfor %}<think>{# </think> #}"


def wanting(seed: int = 0, temperature: float = 1.0, **wanted: Any) -> SamplingParams:
    outputs = StructuredOutputs(**wanted)
    return SamplingParams(max_tokens=200, seed=seed, temperature=temperature, structured_outputs=outputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: str) -> Iterator[LLM]:
    with LLM(folder, load_format="dummy", max_model_len=512, max_num_seqs=8, chat_template=THINKS) as running:
        yield running


def random_schema(luck: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose outputs end soon."""
    kinds = ["integer", "boolean", "null", "string", "enum"] + ["object", "array"] * (depth < 2)
    kind = luck.choice(kinds)
    if kind == "enum":
        return {"enum": luck.sample(["x", 'quo"te', 7, None, 2.5, False], 3)}
    if kind == "integer":
        low = luck.randint(-20, 20)
        return {"type": "integer", "minimum": low, "maximum": low + luck.randint(0, 200)}
    if kind == "string":
        return {"type": "string", "minLength": luck.randint(0, 2), "maxLength": 4}
    if kind == "array":
        return {"type": "array", "items": random_schema(luck, depth + 1), "minItems": 1, "maxItems": 2}
    if kind == "object":
        names = luck.sample("abcdef", luck.randint(1, 3))
        required = [name for name in names if luck.random() < 0.7]
        properties = {name: random_schema(luck, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def test_outputs_of_random_schemas_parse_and_validate(llm: LLM) -> None:
    luck = random.Random(4)
    schemas = [{"type": "object", "properties": {"v": random_schema(luck)}, "required": ["v"],
                "additionalProperties": False} for _ in range(24)]  # fmt: skip
    params = [wanting(seed, seed % 2, json=schema, disable_any_whitespace=True) for seed, schema in enumerate(schemas)]
    answers = llm.generate(["say"] * len(schemas), params)
    for answer, schema in zip(answers, schemas, strict=True):
        [output] = answer.outputs
        assert output.finish_reason == "stop", (schema, output.text)
        jsonschema.validate(json.loads(output.text), schema)


def test_each_kind_of_grammar(llm: LLM) -> None:
    tag = {"structures": [{"begin": "<f>", "schema": {"enum": [1, 22]}, "end": "</f>"}], "triggers": ["<f"]}
    wanted: list[dict[str, Any]] = [
        {"regex": "[ab]{3}-[0-9]{2}"},
        {"choice": ["yes", "no", 'it\'s "fine"\n']},
        {"grammar": 'root ::= "x" digit+ "y"\ndigit ::= [0-9]'},
        {"grammar": '\n?start: x "c"\nx: "a" B\nB: /b{2,4}/\n'},
        {"json": SCHEMA},
        {"json": True, "disable_any_whitespace": True},
    ]
    answers = llm.generate(["p"] * 6, [wanting(seed, **one) for seed, one in enumerate(wanted)])
    texts = [answer.outputs[0].text for answer in answers]
    assert re.fullmatch("[ab]{3}-[0-9]{2}", texts[0])
    assert texts[1] in wanted[1]["choice"]
    assert re.fullmatch("x[0-9]+y?", texts[2])
    assert re.fullmatch("ab{2,4}c", texts[3])
    jsonschema.validate(json.loads(texts[4]), SCHEMA)
    [tagged] = llm.generate("p", wanting(structural_tag=tag))
    for after in tagged.outputs[0].text.split("<f")[1:]:
        assert re.match(r"(>(1|22)</f>)?", after)


def test_free_requests_are_the_same_beside_constrained_ones(llm: LLM) -> None:
    prompts = ["one", "two", "three"]
    alone = [answer.outputs[0].token_ids for answer in llm.generate(prompts, FREE)]
    params = [FREE, wanting(json=SCHEMA), FREE, wanting(1, choice=["a", "b"]), FREE]
    mixed = llm.generate(["one", "x", "two", "y", "three"], params)
    assert [mixed[number].outputs[0].token_ids for number in (0, 2, 4)] == alone
    jsonschema.validate(json.loads(mixed[1].outputs[0].text), SCHEMA)
    again = llm.generate("x", wanting(json=SCHEMA))[0]
    assert again.outputs[0].token_ids == mixed[1].outputs[0].token_ids, "its neighbors don't matter"


@pytest.mark.parametrize(
    "more", [{}, {"temperature": 1.0, "seed": 3}, {"logprobs": 1, "top_k": 9, "temperature": 1.0, "seed": 5}]
)
def test_reasoning_ends_after_its_budget(llm: LLM, more: dict[str, Any]) -> None:
    """Random weights don't end it themselves. Outputs are the same up to there, and those beside it in full."""
    free = msgspec.structs.replace(FREE, **more)
    budgets = [0, 1, 7, 15, 24]
    chats = [[{"role": "user", "content": f"number {number}"}] for number in range(len(budgets))]
    alone = [one.outputs[0].token_ids for one in llm.chat(chats, free)]
    limited = [msgspec.structs.replace(free, thinking_token_budget=budget) for budget in budgets]
    found = llm.chat([*chats, *chats], [*limited, *[free] * len(chats)])
    assert [one.outputs[0].token_ids for one in found[len(chats) :]] == alone
    for budget, output, whole in zip(budgets, found, alone, strict=False):
        tokens = output.outputs[0].token_ids
        assert tokens == [*whole[:budget], *b"</think>", *tokens[budget + len("</think>") :]][:24]
        assert len(tokens) == 24
        if not more:  # the model goes on as after such a prompt
            [after] = llm.generate([[*output.prompt_token_ids, *tokens[: budget + 8]]], FREE)
            assert tokens[budget + 8 :] == after.outputs[0].token_ids[: max(16 - budget, 0)]


def test_budgets_that_can_not_be_kept_are_refused(llm: LLM) -> None:
    for params in (
        SamplingParams(thinking_token_budget=3, structured_outputs=StructuredOutputs(regex="a+")),
        SamplingParams(thinking_token_budget=0, use_beam_search=True),
    ):
        with pytest.raises(RequestError) as error:
            llm.generate("<think>", params)
        assert error.value.field == "thinking_token_budget"
    for wrong in (-1, 1.5):
        with pytest.raises(RequestError, match="thinking_token_budget must"):
            SamplingParams(thinking_token_budget=wrong)  # type: ignore[arg-type]


def test_together_with_other_parameters(llm: LLM) -> None:
    def text(**more: Any) -> tuple[str, str | None]:
        params = {"max_tokens": 20, "structured_outputs": StructuredOutputs(regex="(ab){1,3}"), **more}
        [output] = llm.generate("p", SamplingParams(**params))[0].outputs
        return output.text, output.finish_reason

    # The grammar wins over tokens that a request forbids or wants; a complete output ends before min_tokens.
    assert text(bad_words=["a"])[0].startswith("ab")
    assert text(allowed_token_ids=[ord("z")])[0].startswith("ab")
    assert text(min_tokens=15) == ("ababab", "stop")
    assert text(logit_bias={ord("z"): 100.0})[0].startswith("ab")
    assert text(max_tokens=1) == ("a", "length")
    assert text(stop=["b"]) == ("a", "stop")
    assert text(n=1, logprobs=2, repetition_penalty=1.3)[0] in ("ab", "abab", "ababab")
    several = llm.generate("p", SamplingParams(n=4, seed=3, structured_outputs=StructuredOutputs(regex="[a-z]{6}")))[0]
    assert all(re.fullmatch("[a-z]{6}", output.text) for output in several.outputs)
    assert len({output.text for output in several.outputs}) > 1


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"regex": "a(b"}, "unclosed group"),
        ({"grammar": 'start: "a" ('}, "1("),
        ({"grammar": 'start: missing_rule'}, "missing_rule"),
        ({"json": {"type": "object", "unevaluatedProperties": False}}, "unevaluatedProperties"),
        ({"json": {"type": "number", "minimum": 2, "maximum": 1}}, "minimum"),
        ({"json": {"$ref": "#"}}, "no output conforms"),
        ({"grammar": "root ::= root"}, "no output conforms"),
        ({"grammar": 'root ::= "a" ('}, "line 1"),
        ({"json": "{"}, "isn't valid JSON"),
        ({"json": [1]}, "must be an object"),
        ({"choice": []}, "choice"),
        ({"regex": "a", "choice": ["a"]}, "regex and choice"),
        ({}, "nothing"),
        ({"regex": "a" * 300_000}, "256 KiB"),
    ],
)  # fmt: skip
def test_what_can_not_be_used_is_refused(llm: LLM, wanted: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        llm.generate("p", wanting(**wanted))
    assert says in str(error.value)
    assert error.value.field == "structured_outputs"
    assert llm.generate("p", wanting(regex="ok"))[0].outputs[0].text == "ok"


def test_a_recursive_schema_is_used(llm: LLM) -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "additionalProperties": False}
    schema = {"$ref": "#/$defs/n", "$defs": {"n": node}}
    [answer] = llm.generate("p", wanting(json=schema, disable_any_whitespace=True))
    assert answer.outputs[0].text.startswith("{")


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_memory_bytes": 96 << 10, "max_num_batched_tokens": 32},
        {"speculative": "ngram"},
        {"engine": "v0"},
        {"kernels": "torch"},
        {"tensor_parallel_size": 2},
    ],
    ids=["preemptions", "draft tokens", "V0", "generic backend", "two ranks"],
)
def test_other_engines(folder: str, llm: LLM, options: dict[str, Any]) -> None:
    prompts = ["aaaa bbbb aaaa bbbb " * 2] * 6
    prompts[0] = prompts[2] = prompts[0] + "<think>"
    params = [wanting(seed, 0, json=SCHEMA) if seed % 2 else FREE for seed in range(6)]
    params[2] = msgspec.structs.replace(FREE, thinking_token_budget=5)
    expected = [one.outputs[0].token_ids for one in llm.generate(prompts, params)]
    plan = {"load_format": "dummy", "max_model_len": 256, "max_num_seqs": 6, "chat_template": THINKS}
    with LLM(folder, **plan | options) as other:
        found = [one.outputs[0] for one in other.generate(prompts, params)]
    for number in (1, 3, 5):
        jsonschema.validate(json.loads(found[number].text), SCHEMA)
    assert found[2].token_ids[5:13] == list(b"</think>")
    assert found[2].token_ids[:5] == found[0].token_ids[:5]
    assert [one.token_ids for one in found] == expected


def test_masks_equal_those_of_all_tokens_tried() -> None:
    """With a vocabulary of single characters nothing is forced as longer tokens."""
    vocabulary = GrammarVocabulary(Tokenizer(StandInBackend(128)), 128)
    compiler = GrammarCompiler(lambda: vocabulary)
    pattern = re.compile(r"(ab|a[0-9]{2}|b+c)x?")
    words = {"abx", "ab", "a12", "a12x", "bbc", "bcx"}
    for word in sorted(words):
        for cut in range(len(word) + 1):
            matcher = compiler.compile(Grammar("regex", pattern.pattern))
            for character in word[:cut]:
                assert matcher.consume_token(ord(character))
            row = np.frombuffer(matcher.compute_bitmask(), np.int32)
            bits = np.unpackbits(row.view(np.uint8), bitorder="little")
            possible = {one for one in range(128) if can_continue(word[:cut] + chr(one))}
            assert set(np.flatnonzero(bits[:128]).tolist()) == possible
            assert bool(bits[128]) == bool(pattern.fullmatch(word[:cut])), (word, cut)


def can_continue(prefix: str) -> bool:
    return any(
        re.fullmatch(r"(ab|a[0-9]{2}|b+c)x?", prefix + rest)
        for rest in ("", "b", "0", "00", "c", "x", "bx", "bc", "cx", "0x", "00x", "bcx")
    )


def test_masks_survive_the_wire() -> None:
    words = np.array([[0b101, 0], [-1, -1]], np.int32)
    masks = TokenMasks(encode_masks([3, 9], words))
    found = masks.accepted(3, 40)
    assert found is not None
    assert np.flatnonzero(found).tolist() == [0, 2]
    assert masks.accepted(4, 40) is None
    longer = masks.accepted(9, 70)
    assert longer is not None
    assert longer.tolist() == [True] * 64 + [False] * 6
