"""`make eval-vision`: how many held-out questions of easy-VQA `smollm2-135m-vision` answers right, over HTTP.

A server is started, and each question goes to /v1/chat/completions with its picture, in a request of its own; then with
the picture of another question, which tells how much of the accuracy comes from the pictures. An answer counts as
right if it is the expected word. Prints a table and writes results/eval-vision.json, rows: pictures (own, exchanged,
none), kind (all, color, shape, yes or no), questions, right (share). The rows of `none` need no model: the answer most
frequent in training to a question of the same text.
"""

import argparse
import asyncio
import base64
import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.serving import serve
from training.pictures import COLORS, Question, load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "eval-vision.json"
MODEL = "smollm2-135m-vision"
CONCURRENT = 16
MOST_TOKENS = 8
KINDS = ("all", "yes or no", "shape", "color")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.perf.eval_vision", description=__doc__)
    parser.add_argument("--questions", type=int, default=2000, help="a random sample; 0 asks all 9,673")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and of the exchange")
    parser.add_argument("--url", help="of a server that runs the model already")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("flags", nargs="*", help="for the server, after --")
    return parser.parse_args()


def main() -> None:
    options = parse()
    split = load("test")
    asked = split.questions
    if options.questions:
        asked = random.Random(options.seed).sample(asked, min(options.questions, len(asked)))
    pictures = [base64.b64encode(file.read_bytes()).decode() for file in split.files]
    other = exchanged([question.picture for question in asked], random.Random(options.seed))
    with ExitStack() as stack:
        url = options.url
        if url is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            url = stack.enter_context(serve(folder, MODEL, *options.flags)).url
        rows = []
        for name, shown in (("own", [question.picture for question in asked]), ("exchanged", other)):
            answers = asyncio.run(ask(url, asked, [pictures[index] for index in shown], name))
            rows += judge(name, asked, answers)
    rows += judge("none", asked, without_pictures(load("train").questions, asked))
    show(rows)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")


def exchanged(pictures: Sequence[int], choice: random.Random) -> list[int]:
    """For each question the picture of another one, never its own picture."""
    while True:
        others = choice.sample(pictures, len(pictures))
        same = [place for place, picture in enumerate(pictures) if others[place] == picture]
        for place in same:
            partner = choice.randrange(len(others))
            others[place], others[partner] = others[partner], others[place]
        if all(other != picture for other, picture in zip(others, pictures, strict=True)):
            return others


def without_pictures(known: Iterable[Question], asked: Iterable[Question]) -> list[str]:
    """The most frequent answer to each question's text."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in known:
        answers[question.text][question.answer] += 1
    return [answers[question.text].most_common(1)[0][0] for question in asked]


async def ask(url: str, questions: Sequence[Question], pictures: Sequence[str], name: str) -> list[str]:
    """The answers, CONCURRENT questions at a time.

    Args:
        pictures: base64 of a PNG for each question.
    """
    limit = asyncio.Semaphore(CONCURRENT)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{name} pictures", total=len(questions))
        async with httpx.AsyncClient(base_url=url, timeout=300.0) as client:

            async def one(question: Question, picture: str) -> str:
                async with limit:
                    answer = await client.post("/v1/chat/completions", json=body(question.text, picture))
                answer.raise_for_status()
                progress.advance(task)
                return str(answer.json()["choices"][0]["message"]["content"])

            return await asyncio.gather(*(one(*pair) for pair in zip(questions, pictures, strict=True)))


def body(text: str, picture: str) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    content = [image, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL, "messages": messages, "max_tokens": MOST_TOKENS, "temperature": 0}


def kind(question: Question) -> str:
    if question.answer in ("yes", "no"):
        return "yes or no"
    return "color" if question.answer in COLORS else "shape"


def judge(name: str, questions: Sequence[Question], answers: Sequence[str]) -> list[dict[str, Any]]:
    found: dict[str, list[bool]] = {one: [] for one in KINDS}
    for question, answer in zip(questions, answers, strict=True):
        right = answer.strip().lower().rstrip(".") == question.answer
        found["all"].append(right)
        found[kind(question)].append(right)
    return [
        {"pictures": name, "kind": one, "questions": len(right), "right": round(sum(right) / len(right), 4)}
        for one, right in found.items()
        if right
    ]


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("pictures", *KINDS, title="share of questions answered right")
    for name in dict.fromkeys(row["pictures"] for row in rows):
        shares = {row["kind"]: f"{row['right']:.1%}" for row in rows if row["pictures"] == name}
        table.add_row(name, *(shares.get(one, "–") for one in KINDS))
    Console().print(table)


if __name__ == "__main__":
    main()
