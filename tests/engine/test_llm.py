"""LLM from a script of a user's own: the engine in its process, no server."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import EngineDeadError, ModelError, RequestError
from redline import LLM, SamplingParams
from tests.tiny import write_tiny

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path)
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), load_format="dummy", max_model_len=256, max_num_seqs=4) as running:
        yield running


def test_answers_come_in_the_order_of_the_prompts(llm: LLM):
    prompts = [f"prompt {number}" for number in range(10)]
    together = llm.generate(prompts, GREEDY)
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts[:3]]
    assert [answer.prompt for answer in together] == prompts
    assert [answer.outputs[0].token_ids for answer in together[:3]] == [one.outputs[0].token_ids for one in alone]
    assert all(len(answer.outputs[0].token_ids) == 6 for answer in together)
    assert all(answer.outputs[0].finish_reason == "length" for answer in together)


def test_prompts_in_other_forms(llm: LLM):
    [text] = llm.generate("ab", GREEDY)
    ids = llm.generate([[97, 98], {"prompt_token_ids": [97, 98]}, {"prompt": "ab"}], GREEDY)
    assert {tuple(answer.outputs[0].token_ids) for answer in (text, *ids)} == {tuple(text.outputs[0].token_ids)}
    assert llm.generate([97, 98], GREEDY)[0].prompt_token_ids == [97, 98]


def test_params_of_their_own_and_several_outputs(llm: LLM):
    params = [SamplingParams(max_tokens=2, n=3, seed=1), SamplingParams(max_tokens=4, logprobs=2, temperature=0)]
    many, one = llm.generate(["a", "b"], params)
    assert [output.index for output in many.outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in many.outputs}) > 1
    [output] = one.outputs
    assert output.logprobs is not None
    for token, shown in zip(output.token_ids, output.logprobs, strict=True):
        assert shown[token].rank == 1
        assert len(shown) == 2
        assert shown[token].decoded_token == llm.tokenizer.token_text(token)
    assert output.cumulative_logprob == pytest.approx(
        sum(shown[token].logprob for token, shown in zip(output.token_ids, output.logprobs, strict=True))
    )


def test_chat_is_a_prompt_by_the_template(llm: LLM):
    conversation = [{"role": "user", "content": "ab"}]
    one = llm.chat(conversation, GREEDY)
    two = llm.chat([conversation, conversation], GREEDY)
    assert one[0].prompt == "ab"
    assert {tuple(answer.outputs[0].token_ids) for answer in (*one, *two)} == {tuple(one[0].outputs[0].token_ids)}


def test_a_prompt_that_cannot_be_served_leaves_nothing_running(llm: LLM):
    with pytest.raises(RequestError, match="256"):
        llm.generate(["a", [1] * 300], GREEDY)
    with pytest.raises(RequestError, match=r"that of prompts \(2\)"):
        llm.generate(["a", "b"], [GREEDY])
    assert llm.generate("a", GREEDY)


def test_wrong_settings_are_named(folder: Path):
    with pytest.raises(TypeError, match="colour"):
        LLM(str(folder), colour="red")
    with pytest.raises(ModelError, match="/no/such"):
        LLM("/no/such/model")


def test_a_plain_script_needs_no_guard_and_ends_by_itself(folder: Path, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from redline import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], load_format='dummy', max_model_len=64)\n"
        "print(len(llm.generate(['a', 'b'], SamplingParams(max_tokens=3, ignore_eos=True))))\n"
        "llm.close()\n"
        "llm.close()\n"
        "try:\n"
        "    llm.generate('a')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)\n"
        "LLM(sys.argv[1], load_format='dummy', max_model_len=64)\n"
    )
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", EngineDeadError.__name__]
