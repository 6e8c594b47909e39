"""WeightLoRA's Figure 3: the memory of training against the number of adapters, for ranks and places over the depth."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightlora import measure, methods, options
from weightlora.adapters import attach, list_adapters, surgery
from weightlora.errors import ConfigError
from weightlora.figures.pictures import figure_class, plain
from weightlora.figures.runs import as_settings, record
from weightlora.forecast.curves import PLACEMENTS, Point, curve
from weightlora.forecast.meta import Device
from weightlora.forecast.model import inputs_for
from weightlora.training.forecasting import Setting, setting_of, size_in_bytes
from weightlora.training.recipe import Recipe

MEMORY_FILE, MEMORY_PICTURE = "memory.jsonl", "memory.png"
GIB = 2**30
PARTS = {
    "weights_bytes": ("frozen weights", "#b4bac1"),
    "trained_bytes": ("trained weights", "#5b4bb5"),
    "gradient_bytes": ("gradients", "#9c3d74"),
    "optimizer_bytes": ("optimizer state", "#7a5b00"),
    "saved_bytes": ("activations", "#0b5cad"),
    "working_bytes": ("for a moment of backward", "#9cc3e8"),
}
_RANKS = (1, 8, 64)
_STYLES = (":", "--", "-", "-.")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def draw_memory(
    recipe: Recipe,
    out: str | Path,
    *,
    ranks: Sequence[int] = _RANKS,
    memory: str | int | None = None,
    device: Device | None = None,
    points: int = 20,
    measured: int = 0,
) -> list[dict[str, Any]]:
    """WeightLoRA's Figure 3 for a recipe, from the model's config.json alone: memory.jsonl and memory.png in `out`.

    Adapters are computed as this library does, whose forward pass keeps less than stock PEFT's LoRA (`estimate` has
    both). They lie on the first modules, on the last, or spread over the depth. Batches are full: no token is padding.

    Args:
        ranks: of the adapters; all are drawn, and what memory is made of for the highest.
        memory: a budget such as "16 GB", or bytes, drawn as a line.
        device: where it will run. Default: what is here.
        points: about how many numbers of adapters, from none to all.
        measured: how many of them to measure too, on the CPU, with random weights of the model's size; 0 does not.

    Returns:
        The lines of the file: "predicted" or "measured", rank, placement, number of adapters, and bytes of every part;
        measured lines lack what backward needs for a moment.

    Raises:
        ConfigError: the recipe cannot work, or matplotlib is not installed.
    """
    figure_class()
    if not ranks:
        raise ConfigError("`ranks` names none; give one such as 8.")
    for r in ranks:
        options.whole("ranks", r)
    options.whole("points", points)
    options.whole("measured", measured, 0)
    budget = size_in_bytes(memory, "--memory") if isinstance(memory, str) else memory
    setting = setting_of(recipe, device="cpu" if measured else device)
    settings = {"recipe": as_settings(recipe), "points": points, "device": setting.training.device}
    with record(out, MEMORY_FILE, settings) as found:
        for r in ranks:
            for how, number, take in (("predicted", points, _predicted), ("measured", measured, _measured)):
                if number and not any((line["how"], line["r"]) == (how, r) for line in found.lines):
                    found.add({"how": how, "r": r, **line} for line in take(setting, r, number))
        lines = [line for line in found.lines if line["r"] in ranks and (measured or line["how"] == "predicted")]
        line = None if budget is None else (budget, memory if isinstance(memory, str) else f"{budget / GIB:.3g} GiB")
        _picture(lines, line, f"{_short(recipe.model.name)}, {_batch(setting)}", found.folder)
    return lines


def fits(lines: Sequence[Mapping[str, Any]], budget: int) -> dict[tuple[int, str], int | None]:
    """{(rank, placement): the largest number of adapters below the budget, None where not even none is}."""
    found: dict[tuple[int, str], int | None] = {}
    for line in lines:
        if line["how"] == "predicted":
            key = line["r"], line["placement"]
            best = found.setdefault(key, None)
            if line["peak_bytes"] <= budget and (best is None or line["kept"] > best):
                found[key] = line["kept"]
    return found


def _short(name: str) -> str:
    """The last two parts of a name: a whole one of the hub."""
    return "/".join(name.rstrip("/").split("/")[-2:])


def _batch(setting: Setting) -> str:
    t = setting.training
    return f"{t.batch}x{t.length} tokens, {t.precision}{', checkpointing' if t.checkpointing else ''}"


def _curve(setting: Setting, r: int, number: int) -> Iterator[Point]:
    return curve(setting.model, {**setting.lora, "r": r}, setting.training, number)


def _predicted(setting: Setting, r: int, number: int) -> Iterator[dict[str, Any]]:
    for point in _curve(setting, r, number):
        parts = {name: getattr(point.memory, name) for name in PARTS}
        yield {"placement": point.placement, "kept": point.kept, **parts, "peak_bytes": point.memory.peak_bytes}


# -- measured ----------------------------------------------------------------------------------------------------------


def _measured(setting: Setting, r: int, number: int) -> Iterator[dict[str, Any]]:
    for point in _curve(setting, r, number):
        parts = measure_step(_built(setting, r, point.names), setting)
        yield {"placement": point.placement, "kept": point.kept, **parts}


def _built(setting: Setting, r: int, names: Sequence[str]) -> nn.Module:
    """The model with random weights in memory, and adapters on these modules."""
    t = setting.training
    if t.precision not in _DTYPES:
        raise ConfigError(f"A base in {t.precision} cannot be measured on a CPU; take it out of the recipe's `model`.")
    base = type(setting.model)._from_config(copy.deepcopy(setting.model.config), dtype=_DTYPES[t.precision])
    if t.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = methods.prepare("lora", base, copy.deepcopy({**setting.lora, "r": r}))
    kept = set(names)
    surgery.disconnect(model, [adapter for adapter in list_adapters(model) if adapter.name not in kept])
    attach.use_kernel(list_adapters(model), gates=False)
    return model


def measure_step(model: nn.Module, setting: Setting) -> dict[str, int]:
    """Bytes of one step of AdamW, part by part."""
    t = setting.training
    shapes = inputs_for(setting.model, t.batch, t.length, t.target_length)
    inputs = {name: torch.ones(x.shape, dtype=x.dtype) for name, x in shapes.items()}
    if "labels" in inputs and inputs["labels"].dim() == 1:
        inputs["labels"].zero_()
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    parts = {"weights_bytes": frozen, "trained_bytes": _size(trained), "gradient_bytes": 0, "optimizer_bytes": 0}
    model.train()

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", t.autocast or torch.bfloat16, enabled=t.autocast is not None):
            return model(**inputs).loss

    parts["saved_bytes"] = measure.saved_bytes(forward, exclude=model) if trained else 0
    if trained:
        optimizer = torch.optim.AdamW(trained)
        forward().backward()
        parts["gradient_bytes"] = _size([p.grad for p in trained if p.grad is not None])
        optimizer.step()
        parts["optimizer_bytes"] = measure.optimizer_bytes(optimizer)
    return parts


def _size(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# -- the picture -------------------------------------------------------------------------------------------------------


def _picture(lines: Sequence[Mapping[str, Any]], budget: tuple[int, str] | None, title: str, folder: Path) -> None:
    """A panel for each placement: what memory is made of at the highest rank, and the sum at each."""
    ranks = list(dict.fromkeys(line["r"] for line in lines))
    figure = figure_class()(figsize=(10, 3.8), dpi=100, layout="constrained")
    plots = figure.subplots(1, len(PLACEMENTS), sharey=True)
    for axes, placement in zip(plots, PLACEMENTS, strict=True):
        axes.set_title({"spread": "spread over the depth"}.get(placement, f"the {placement} modules"), fontsize=9)
        own = [line for line in lines if line["placement"] == placement]
        top = [line for line in own if (line["how"], line["r"]) == ("predicted", max(ranks))]
        kept = [line["kept"] for line in top]
        bands = [[line[part] / GIB for line in top] for part in PARTS]
        axes.stackplot(kept, bands, labels=[name for name, _ in PARTS.values()], colors=[c for _, c in PARTS.values()])
        for i, r in enumerate(ranks):
            sums = [(x["kept"], x["peak_bytes"] / GIB) for x in own if (x["how"], x["r"]) == ("predicted", r)]
            axes.plot(*zip(*sums, strict=True), _STYLES[i % len(_STYLES)], color="black", lw=1.2, label=f"all, r = {r}")
        dots = [line for line in own if (line["how"], line["r"]) == ("measured", max(ranks))]
        if dots:
            sums = [sum(line.get(part, 0) for part in PARTS) / GIB for line in dots]
            axes.plot([x["kept"] for x in dots], sums, "o", color="#b84300", ms=4, label="measured, up to activations")
        if budget is not None:
            axes.axhline(budget[0] / GIB, color="red", linestyle="--", lw=1.2, label=plain(budget[1]))
        axes.set_xlabel(f"adapters (parts: r = {max(ranks)})")
    plots[0].set_ylabel("GiB")
    plots[0].set_ylim(bottom=0)
    handles, labels = plots[-1].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=7, frameon=False)
    figure.suptitle(plain(title), fontsize=10)
    figure.savefig(folder / MEMORY_PICTURE)
