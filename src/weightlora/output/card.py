"""The model card of an adapter: method, kept adapters, parameters, data and scores, from what the run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weightlora.selection.events import EVENTS_FILE, Event, read_events


def model_card(run: Path, adapter: Path) -> str:
    """Markdown with the front matter the hubs read.

    Args:
        run: folder with `events.jsonl` and `metrics.json`, as far as there are any.
        adapter: folder with `adapter_config.json`.
    """
    config = _json(adapter / "adapter_config.json")
    events = read_events(run / EVENTS_FILE) if (run / EVENTS_FILE).is_file() else []
    parts = [
        _front_matter(config),
        "# LoRA adapter",
        *_origin(config, events),
        *_adapters(events),
        *_scores(run),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: dict[str, Any]) -> str:
    lines = [
        f"base_model: {config.get('base_model_name_or_path')}",
        "library_name: peft",
        "tags: [lora, weightlora]",
    ]
    return "\n".join(["---", *lines, "---"])


def _origin(config: dict[str, Any], events: list[Event]) -> list[str]:
    method = next((e["method"] for e in events if e["event"] == "attach"), "lora")
    return [
        f"Trained from `{config.get('base_model_name_or_path')}` with the method `{method}`. It is an ordinary PEFT LoRA: "
        "`PeftModel.from_pretrained(base_model, this_folder)` loads it."
    ]


def _adapters(events: list[Event]) -> list[str]:
    cuts = [e for e in events if e["event"] == "cut"]
    if not cuts:
        return []
    last, attached = cuts[-1], next(e for e in events if e["event"] == "attach")
    ranks = {name: facts["r"] for name, facts in attached["adapters"].items()}
    for event in events:
        ranks |= event["ranks"] if event["event"] == "expand" else {}
    parameters = next((e["parameters_after"] for e in reversed(events) if "parameters_after" in e), 0)
    rows = [f"| `{name}` | {ranks[name]} | {_text(last['scores'].get(name))} |" for name in last["kept"]]
    return [
        "## Adapters",
        f"{len(last['kept'])} of {len(attached['adapters'])} adapters were kept at step {last['step']}: {parameters:,} "
        f"trainable parameters, of {attached['parameters']:,} before.",
        "\n".join(["| module | rank | score |", "|---|---|---|", *rows]),
    ]


def _scores(run: Path) -> list[str]:
    metrics = _json(run / "metrics.json")
    if not metrics:
        return []
    data = [f"Data: `{metrics['data']}`."] if metrics.get("data") else []
    flat = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    rows = [f"| {name} | {_text(value)} |" for name, value in flat.items()]
    return ["## Data and scores", *data, "\n".join(["| | |", "|---|---|", *rows])]


def _text(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
