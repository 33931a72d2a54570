"""`python -m training`: trains the tower and the connector of `smollm2-135m-vision`, and writes what ships of it."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from engine.model.resolve import resolve_model
from training import answers, descriptions, tower
from training.checkpoint import write_checkpoint
from training.pictures import COLORS, SHAPES, Split, load
from training.questions import Chat, FrozenTextModel
from training.stages import run_stage

TEXT_MODEL = "smollm2-135m"
console = Console(stderr=True)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    split = load("train")
    folder = resolve_model(TEXT_MODEL, console.print)
    chat, text = load_text_model(folder)
    described = train_descriptions(split, chat, text, options)
    model = train_tower(split, described, options)
    step = answers.AnswerStep(model, split, chat, text, options.seed)
    run_stage(answers.STAGE, model.connector, step, options.work)
    write_checkpoint(model, folder, options.out)
    console.print(f"wrote {options.out}; the steps of the training are in {options.work}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    out = Path(__file__).parents[1] / "datasets" / "vision-model"
    parser.add_argument("--out", type=Path, default=out, help="the folder that ships")
    parser.add_argument("--work", type=Path, default=Path("build/train-vision"), help="checkpoints to go on from")
    parser.add_argument("--restart", action="store_true", help="delete those checkpoints first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.restart:
        shutil.rmtree(options.work, ignore_errors=True)
    return options


def load_text_model(folder: Path) -> tuple[Chat, FrozenTextModel]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    chat = Chat(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    return chat, FrozenTextModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), chat.before)


def train_descriptions(
    split: Split, chat: Chat, text: FrozenTextModel, options: argparse.Namespace
) -> descriptions.Descriptions:
    torch.manual_seed(options.seed)
    words = [descriptions.word_embeddings(names, chat, text) for names in (SHAPES, COLORS)]
    described = descriptions.Descriptions(*words)
    step = descriptions.DescriptionStep(described, split, chat, text, options.seed)
    run_stage(descriptions.STAGE, described, step, options.work)
    return described


def train_tower(split: Split, described: descriptions.Descriptions, options: argparse.Namespace) -> tower.Tower:
    torch.manual_seed(options.seed)
    model = tower.Tower(hidden=described.base.shape[1])
    run_stage(tower.SEEING, model, tower.SeeingStep(model, split, options.seed), options.work)
    run_stage(tower.CONNECTING, model, tower.ConnectingStep(model, split, described, options.seed), options.work)
    of_shapes, of_colors = tower.seen_right(model, load("test"))
    console.print(f"held-out pictures told right: shape {of_shapes:.1%}, color {of_colors:.1%}")
    return model


if __name__ == "__main__":
    main()
