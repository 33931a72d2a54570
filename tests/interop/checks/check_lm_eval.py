"""lm-eval: log-likelihoods of continuations against transformers, and generation, on tasks in local files."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from checking import Target, check, main, run_tool

# float32 in other kernels, summed over the tokens of a continuation.
TOLERANCE = 2e-3
COUNTED = ("One two three four five six seven", "Monday Tuesday Wednesday Thursday Friday", "a b c d e f g h i j")


def evaluate(
    target: Target, kind: str, task: dict[str, Any], documents: list[dict[str, Any]], batch: int = 1, **options: Any
) -> Any:
    """Run `lm_eval` on a task; return its results and the records of its documents."""
    endpoint = "completions" if kind == "local-completions" else "chat/completions"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "documents.jsonl"
        data.write_text("".join(json.dumps(one) + "\n" for one in documents))
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / "small.yaml").write_text(yaml.safe_dump({"task": "small", **files, **task}))
        settings = {
            "model": target.model, "base_url": f"{target.base_url}/{endpoint}", "tokenizer": target.folder,
            "num_concurrent": 4, **options,
        }  # fmt: skip
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", kind,
            "--model_args", ",".join(f"{key}={value}" for key, value in settings.items()),
            "--include_path", folder, "--tasks", "small", "--output_path", folder / "out", "--log_samples",
            "--batch_size", str(batch),
        ]  # fmt: skip
        run_tool([*command, *(["--apply_chat_template"] if "chat" in kind else [])], folder)
        (results,) = (folder / "out").rglob("results_*.json")
        (samples,) = (folder / "out").rglob("samples_*.jsonl")
        lines = samples.read_text().splitlines()
        return json.loads(results.read_text())["results"]["small"], [json.loads(line) for line in lines]


def check_likelihoods(target: Target, **options: Any) -> str:
    """Compare the log-likelihoods of a task of multiple choice with those of transformers."""
    documents = [{"context": one.context, "choices": one.choices, "answer": 0} for one in target.questions]
    task = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    results, samples = evaluate(target, "local-completions", task, documents, **options)
    worst, right = 0.0, []
    for sample in samples:
        expected = target.questions[sample["doc_id"]].likelihoods
        found = [float(response[0][0]) for response in sample["resps"]]
        worst = max(worst, *(abs(one - other) for one, other in zip(found, expected, strict=True)))
        right.append(max(expected) == expected[0])
    assert len(samples) == len(target.questions)
    assert worst < TOLERANCE, f"log-likelihoods differ by up to {worst:.4f}"
    assert results["acc,none"] == sum(right) / len(right)
    return f"largest difference from transformers {worst:.1e}"


@check("local-completions, loglikelihood of token ids")
def loglikelihood(target: Target) -> str:
    return check_likelihoods(target)


@check("local-completions, loglikelihood of texts in batches")
def loglikelihood_texts(target: Target) -> str:
    return check_likelihoods(target, tokenized_requests=False, batch=4)


@check("local-completions, loglikelihood_rolling")
def rolling(target: Target) -> None:
    documents = [{"text": text} for text in COUNTED]
    task = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    results, samples = evaluate(target, "local-completions", task, documents)
    assert len(samples) == len(documents)
    assert 1 < results["word_perplexity,none"] < 1e4


def check_generation(target: Target, kind: str, context: str, expected: str) -> None:
    """Generate for the contexts of all questions; one of them must be continued as expected."""
    documents = [{"text": one.context} for one in target.questions]
    task = {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    _, samples = evaluate(target, kind, task, documents)
    texts = {documents[sample["doc_id"]]["text"]: sample["resps"][0][0] for sample in samples}
    assert len(texts) == len(documents)
    assert expected in texts[context], texts
    assert not any("\n" in text for text in texts.values())


@check("local-completions, generate_until")
def generation(target: Target) -> None:
    check_generation(target, "local-completions", "The capital of France is", "Paris")


@check("local-chat-completions, generate_until")
def chat(target: Target) -> None:
    check_generation(target, "local-chat-completions", "The opposite of hot is", "cold")


if __name__ == "__main__":
    main("lm-eval", "lm_eval")
