"""The model card of an adapter or model: method, adapters, parameters, data and scores, from what the run wrote.

Names of models, files, labels and metrics come from others, and nothing in them is read as markup. The front matter is
written by the hub's own library.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCardData

from weightlora.errors import ConfigError
from weightlora.output import records
from weightlora.output.hub import is_hub_id
from weightlora.selection.events import Event
from weightlora.tasks.base import Task, get_task

logger = logging.getLogger(__name__)


def model_card(
    run: Path,
    adapter: Path,
    *,
    merged: bool = False,
    gguf: bool = False,
    metrics: dict[str, Any] | None = None,
    base: str | None = None,
    public: bool = False,
) -> str:
    """Markdown with the front matter the hubs read.

    Args:
        run: folder with `events.jsonl` and `metrics.json`, as far as there are any and they can be read.
        adapter: folder with `adapter_config.json`; without one the card is for a plain model.
        merged: the card is for the model with the adapter in its weights.
        gguf: it is for the adapter as a file of llama.cpp's.
        metrics: the later content of `metrics.json`, while the run has not written it.
        base: what the base model is called, if not as the adapter says.
        public: others will read it: nothing says in which folders of this machine data lay.
    """
    config = records.adapter_config(adapter)
    metrics = records.metrics(run) if metrics is None else metrics
    events = records.events(run)
    base = base or config.get("base_model_name_or_path") or metrics.get("model")
    if public and base is not None and not is_hub_id(base):
        base = None
    plain = merged or not config
    method = str(metrics.get("method") or _method(events))
    parts = [
        _front_matter(run, base, "gguf" if gguf else "transformers" if plain else "peft", metrics),
        "# Fine-tuned model" if plain else f"# {_kind(config)} adapter",
        _origin(base, method, config, merged, gguf),
        *_section(lambda: _adapters(events), "events.jsonl"),
        *_section(lambda: _data_and_scores(run, metrics, public), "metrics.json and recipe.yaml"),
    ]
    return "\n\n".join(parts) + "\n"


def _section(make: Callable[[], list[str]], source: str) -> list[str]:
    """A part of the card; none where its source is not what a run writes."""
    try:
        return make()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration):
        logger.warning("%s does not hold what a run writes, so the model card leaves it out", source)
        return []


def _kind(config: dict[str, Any]) -> str:
    names = {"LORA": "DoRA" if config.get("use_dora") else "LoRA", "ADALORA": "AdaLoRA", "VERA": "VeRA"}
    kind = str(config.get("peft_type", "LORA"))
    return names.get(kind, _text(kind))


def _method(events: list[Event]) -> str:
    return next((str(e.get("method")) for e in events if e["event"] == "attach"), "lora")


# {what sits on the model: what the hub calls its task}
_PIPELINES = {
    "sequence-classification": "text-classification",
    "question-answering": "question-answering",
    "text-generation": "text-generation",
    "next-token": "text-generation",
}
_METRIC = re.compile(r"[a-z][\w-]*")


def _front_matter(run: Path, base: str | None, library: str, metrics: dict[str, Any]) -> str:
    """What the hub reads; what it would not understand, such as a file as the name of a dataset, is left out."""
    task = _task(metrics)
    found = [name for phase in ("after", "test") for name in (metrics.get(phase) or {})] if metrics else []
    data = ModelCardData(
        base_model=None if base is None else " ".join(str(base).split()),
        library_name=library,
        pipeline_tag=None if task is None else _PIPELINES.get(task.head),
        datasets=_datasets(run, task) or None,
        metrics=[n for n in dict.fromkeys(map(str, found)) if n != "loss" and _METRIC.fullmatch(n)] or None,
        tags=["lora", "weightlora"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _task(metrics: dict[str, Any]) -> Task | None:
    try:
        return get_task(str(metrics.get("task")))
    except ConfigError:
        return None


def _datasets(run: Path, task: Task | None) -> list[str]:
    """Those of the recipe, or of the task's benchmark where that names no rows to train on."""
    data = records.recipe(run).get("data")
    named = [data.get("path"), data.get("train")] if isinstance(data, dict) else [data]
    named = [source.get("path") if isinstance(source, dict) else source for source in named]
    if not any(named) and task is not None and task.benchmark is not None:
        named = [task.benchmark.path]
    return [name for name in dict.fromkeys(map(str, filter(None, named))) if is_hub_id(name)]


def _origin(base: str | None, method: str, config: dict[str, Any], merged: bool, gguf: bool) -> str:
    loading = f"It is an ordinary PEFT {_kind(config)}: `PeftModel.from_pretrained(base_model, this_folder)` loads it."
    if merged or not config:
        where = "The adapter is merged into the weights" if config else "The weights are its own"
        loading = f"{where}: `from_pretrained(this_folder)` of transformers loads it."
    if gguf:
        loading = (
            "It is a LoRA for llama.cpp: `llama-cli -m base.gguf --lora adapter.gguf`, with the base model in GGUF. "
            "`ollama create my-model -f Modelfile` makes a model of Ollama from it."
        )
    origin = "a base model of one's own" if base is None else _code(base)
    return f"Trained from {origin} with the method {_code(method)}. {loading}"


def _adapters(events: list[Event]) -> list[str]:
    cuts = [e for e in events if e["event"] == "cut"]
    if not cuts:
        return []
    last, attached = cuts[-1], next(e for e in events if e["event"] == "attach")
    ranks = {name: facts["r"] for name, facts in attached["adapters"].items()}
    for event in events:
        ranks |= event.get("ranks", {})
    parameters = next((e["parameters_after"] for e in reversed(events) if "parameters_after" in e), 0)
    rows = [f"| {_code(name)} | {ranks[name]} | {_number(last['scores'].get(name))} |" for name in last["kept"]]
    return [
        "## Adapters",
        f"{len(last['kept'])} of {len(attached['adapters'])} adapters were kept at step {last['step']}: {parameters:,} "
        f"trainable parameters, of {attached['parameters']:,} before.",
        "\n".join(["| module | rank | score |", "|---|---|---|", *rows]),
        *_shared(events),
    ]


def _shared(events: list[Event]) -> list[str]:
    """Which modules hold one adapter together."""
    groups = [found for e in events if e["event"] == "share" for found in e["shared"].items()]
    return [f"One adapter for {len(names)} more modules of type {_code(kind)}." for kind, names in groups]


def _data_and_scores(run: Path, metrics: dict[str, Any], public: bool) -> list[str]:
    if not metrics:
        return []
    parts = ["## Data and scores", *_data(run, metrics, public)]
    phases = {phase: metrics[phase] for phase in ("before", "after", "test") if metrics.get(phase)}
    names = list(dict.fromkeys(name for scores in phases.values() for name in scores))
    rows = [
        f"| {_text(name)} | {' | '.join(_number(scores.get(name)) for scores in phases.values())} |" for name in names
    ]
    if rows:
        parts.append("\n".join([f"| | {' | '.join(phases)} |", "|---" * (1 + len(phases)) + "|", *rows]))
    return parts


def _data(run: Path, metrics: dict[str, Any], public: bool) -> list[str]:
    """Task, number of rows and, from the recipe beside them, where the rows came from."""
    facts = [f"Task: {_text(metrics['task'])}."] if metrics.get("task") else []
    rows = ", ".join(f"{count:,} {_text(part)}" for part, count in metrics.get("rows", {}).items())
    facts += [f"Rows: {rows}."] if rows else []
    data = records.recipe(run).get("data") or {}
    sources = [f"{part} {_source(data[part], public)}" for part in ("train", "validation", "test") if data.get(part)]
    facts += [f"Data: {', '.join(sources)}."] if sources else []
    return [" ".join(facts)] if facts else []


def _source(source: Any, public: bool) -> str:
    """A file, a `datasets` id, or a share of the training rows."""
    if isinstance(source, int | float):
        return f"{source:.4g} of train"
    parts = [v for v in source.values() if v is not None] if isinstance(source, dict) else [source]
    return _code(" ".join(str(p) if not public or is_hub_id(p) else PurePath(str(p)).name for p in parts))


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _code(text: Any) -> str:
    """A code span, on one line and in one cell of a table."""
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`"


def _text(text: Any) -> str:
    """Plain words, on one line and in one cell of a table."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*[]|" else letter for letter in line)
