"""One process of `test_distributed.py`: trains the toy task and writes what it ended with. Not a test itself."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from helpers import batch, bert, make_trainer, trainable_state
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_text import recipe
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from weightlora import (
    AdaLoRA,
    ALoRA,
    DynamicLoRA,
    Fixed,
    Flexora,
    Halving,
    HeadFirst,
    IncreLoRA,
    LoRADrop,
    Method,
    ReusePrefix,
    RLoRA,
    S2LoRA,
    SoRA,
    SparseAdapter,
    TiedLoRA,
    UnsupportedError,
    WeightLoRA,
    WeightLoRAPlus,
    last_checkpoint,
    list_adapters,
    methods,
    prepare,
)
from weightlora.adapters import distributed
from weightlora.adapters.distributed import wait_for_all
from weightlora.training import stopping
from weightlora.training.recipe import Recipe, parse_recipe
from weightlora.training.run import run
from weightlora.training.stopping import Stopped

# name: (method, `ddp_find_unused_parameters`: None is the Trainer's default, which is on)
METHODS: dict[str, tuple[Any, bool | None]] = {
    "weightlora": (lambda: WeightLoRA(keep=3, after=6), None),
    "weightlora_plus": (lambda: WeightLoRAPlus(keep=3, after=6, rounds=2), False),
    "evidence": (lambda: WeightLoRA(keep=3, after=6, score="gauss_newton"), False),
    "rlora": (lambda: RLoRA(keep=3, after=6), True),
    "fixed": (lambda: Fixed(keep=3, init_after=4), None),
    "halving": (lambda: Halving(keep=3, sets=3, after=6), False),
    "adalora": (lambda: AdaLoRA(tfinal=6), False),
    "flexora": (lambda: Flexora(keep=1, after=6, val_rows=16, val_batches=2), False),
}


SHAPES = {
    "sparse_adapter": lambda: SparseAdapter(warmup=2, score_steps=4),
    "tied_lora": TiedLoRA,
    "s2_lora": lambda: S2LoRA(0.5),
}

# name: (method, rank at the start)
RANKS = {
    "sora": (lambda: SoRA(0.05, after=8), 4),
    "dynamic_lora": (lambda: DynamicLoRA(2), 4),
    "increlora": (lambda: IncreLoRA(3, add_r=1, top_h=5, init_warmup=1, incre_interval=2), 1),
    "alora": (lambda: ALoRA(rounds=2), 4),
}


# name: options of every other method; nothing of ours acts while these train, but for NoRA's checkpoints
REST: dict[str, dict[str, Any]] = {
    "full": {},
    "head": {},
    "bitfit": {},
    "lora": {},
    "rslora": {},
    "dora": {},
    "pissa": {},
    "vera": {"r": 8},
    "vblora": {"vector_length": 16, "num_vectors": 8},
    "eva": {"rho": 1.0},
    "milora": {},
    "melora": {},
    "nora": {"outer_r": 8},
}


def main(folder: Path, batch_size: int) -> None:
    distributed.ENOUGH = 4  # so that a run of few steps finds out
    for name, (method, find_unused) in METHODS.items():
        train(folder, name, method(), batch_size, find_unused)
    for name, (method, r) in RANKS.items():
        train(folder, name, method(), batch_size, False, r=r)
    plain_loop(folder, WeightLoRAPlus(keep=3, after=6), batch_size)
    loop_wrapped_later(folder, WeightLoRA(keep=3, after=6), batch_size)
    reuse(folder, batch_size)
    drop(folder, batch_size)
    head_first(folder, batch_size)
    if "RANK" in os.environ:
        costs(folder, int(os.environ["RANK"]))
        hooked(folder, int(os.environ["RANK"]), batch_size)
        directions(folder, int(os.environ["RANK"]))
    for name, shape in SHAPES.items():
        train(folder, name, shape(), batch_size, False)
    missing(folder, WeightLoRA(keep=3, after=6), batch_size)
    accelerate_loop(folder, WeightLoRAPlus(keep=3, after=6), batch_size)
    for name, options in REST.items():
        train_rest(folder, name, batch_size, **options)
    command(folder, batch_size)
    if "RANK" in os.environ:
        stopped(folder)


def model_without_dropout(name: str = "", **lora: Any) -> PeftModel:
    model = bert(lora_dropout=0.0, **lora)
    if name == "adalora":
        values = {"target_modules": ["query", "key", "value"], "task_type": "SEQ_CLS", "lora_alpha": 32}
        model = prepare(name, model.unload(), values, target_r=2, init_r=4)
    for module in model.modules():
        if type(module).__name__ == "Dropout":
            module.p = 0.0  # masks differ between processes
    return model


def plain_loop(folder: Path, method: Method, batch_size: int) -> None:
    """A loop of one's own around a model that is in DDP already when the method is attached."""
    model, rank = model_without_dropout(), int(os.environ.get("RANK", 0))
    wrapped = DistributedDataParallel(model) if "RANK" in os.environ else model
    method.attach(wrapped)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    method.plan(12)
    method.bind(optimizer)
    for step in range(12):
        wrapped(**batch(batch_size, start=(16 * step) % 64 + rank * batch_size)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    write(folder, "plain", rank, model, {"kept": method.kept}, int(os.environ.get("WORLD_SIZE", 1)))


def loop_wrapped_later(folder: Path, method: Method, batch_size: int) -> None:
    """A loop with the three calls, in which the method is attached first and nobody tells it of DDP."""
    model, rank = model_without_dropout(), int(os.environ.get("RANK", 0))
    method.attach(model)
    wrapped = DistributedDataParallel(model) if "RANK" in os.environ else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    method.plan(12)
    for step in range(12):
        wrapped(**batch(batch_size, start=(16 * step) % 64 + rank * batch_size)).loss.backward()
        method.observe(optimizer)
        optimizer.step()
        method.step(optimizer)
        optimizer.zero_grad()
    write(folder, "wrapped_later", rank, model, {"kept": method.kept}, int(os.environ.get("WORLD_SIZE", 1)))


def accelerate_loop(folder: Path, method: Method, batch_size: int) -> None:
    """A loop with `accelerate`, two micro-batches to a step and the scaling of fp16; the first step overflows."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    accelerator, rank = Accelerator(cpu=True, gradient_accumulation_steps=2), int(os.environ.get("RANK", 0))
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # accelerate itself wants a GPU for fp16
    model = model_without_dropout()
    method.attach(model)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.3))
    method.plan(12)
    method.bind(optimizer)
    micro, skipped = batch_size // 2, 0
    for step in (0, *range(12)):
        for part in range(2):
            with accelerator.accumulate(wrapped):
                start = (16 * step) % 64 + rank * batch_size + part * micro
                loss = wrapped(**batch(micro, start=start)).loss
                accelerator.backward(loss * float("inf") if not skipped else loss)
                optimizer.step()
                optimizer.zero_grad()
        skipped += optimizer.step_was_skipped
    facts = {"kept": method.kept, "skipped": skipped, "steps": method.engine.global_step}
    write(folder, "accelerate", rank, model, facts, accelerator.num_processes)


def reuse(folder: Path, batch_size: int) -> None:
    """The lowest blocks are frozen from the start; examples move between the processes from epoch to epoch."""
    callback = ReusePrefix()
    model = model_without_dropout(layers_to_transform=[2])
    trainer = sgd_trainer(folder / "reuse", callback, model=model, batch_size=batch_size)
    trainer.train()
    facts = {"computed": callback.computed, "reused": callback.reused}
    write(folder, "reuse", trainer.args.process_index, model, facts, trainer.args.world_size)


def costs(folder: Path, rank: int) -> None:
    """What adapters cost, on a batch of another length in every process."""
    wrapped = DistributedDataParallel(model_without_dropout())
    method = WeightLoRA(keep="50% memory", after=6).attach(wrapped)
    wrapped.train()(**{key: value[:, : 6 + rank] if value.dim() == 2 else value for key, value in batch().items()})
    (folder / f"costs-{rank}.json").write_text(json.dumps(method.engine.facts()["costs"]))


def hooked(folder: Path, rank: int, batch_size: int) -> None:
    """Gradients that travel in fp16, as `accelerate` is told, and hooks on the wrapper; a cut after four steps."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    fp16 = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
    accelerator, seen = Accelerator(cpu=True, kwargs_handlers=[fp16]), []
    model = model_without_dropout()
    method = WeightLoRA(keep=3, after=4).attach(model)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.3))
    before = wrapped.register_forward_pre_hook(lambda *_, **__: seen.append("before"), with_kwargs=True)
    wrapped.register_forward_hook(lambda *_: seen.append("after"))
    method.plan(12)
    method.bind(optimizer)
    rounded = []
    for step in range(6):
        accelerator.backward(wrapped(**batch(batch_size, start=(16 * step) % 64 + rank * batch_size)).loss)
        rounded.append(all(is_half(p.grad) for p in model.parameters() if p.grad is not None))
        optimizer.step()
        optimizer.zero_grad()
        if step == 4:
            before.remove()
    cuts = [event["step"] for event in method.events if event["event"] == "cut"]
    facts: dict[str, Any] = {"cuts": cuts, "rounded": rounded, "seen": seen, "refused": []}

    bare = DistributedDataParallel(torch.nn.Linear(2, 1, bias=False))
    bare._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    distributed.rewrap(bare)
    bare(torch.full((1, 2), 1 / 3)).sum().backward()
    facts["built in"] = is_half(bare.module.weight.grad)

    for late in (False, True):
        model, method = model_without_dropout(), WeightLoRA(keep=3, after=2)
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(PowerSGDState(None), powerSGD_hook)
        try:
            method.attach(model if late else wrapped)
            wrapped(**batch())
        except UnsupportedError as error:
            facts["refused"].append([str(error), any("gate" in name for name, _ in model.named_parameters())])
    (folder / f"hooked-{rank}.json").write_text(json.dumps(facts))


def is_half(gradient: torch.Tensor) -> bool:
    return torch.equal(gradient.half().to(gradient), gradient)


def directions(folder: Path, rank: int) -> None:
    """The first module is reached in the first process alone, the second in neither, as experts are."""
    model = model_without_dropout(target_modules=["query"])
    method = Fixed(keep=3, modules="all", init_after=1).attach(model)
    method.plan(20)
    for place, sketch in enumerate(method.engine._sketches):
        if place == 2 or (place == 0 and rank == 0):
            generator = torch.Generator().manual_seed(rank)
            x, d = (torch.randn(4, n, generator=generator) for n in (sketch.adapter.in_features, 32))
            sketch._add(x, d)
    method.engine.step(None)
    save_file(trainable_state(model), folder / f"directions-{rank}.safetensors")
    (folder / f"directions-{rank}.json").write_text(json.dumps(method.events[-1]))


def drop(folder: Path, batch_size: int) -> None:
    """Phase 1 is AdamW, so at a rate where the last bit of a gradient does not decide which module is kept."""
    method, model = LoRADrop(keep=1, sample=0.5), model_without_dropout()
    trainer = sgd_trainer(folder / "lora_drop", method, model=model, batch_size=batch_size, learning_rate=0.01)
    trainer.train()
    facts = {"kept": method.kept, "importance": method.engine.importance}
    write(folder, "lora_drop", trainer.args.process_index, model, facts, trainer.args.world_size)


def head_first(folder: Path, batch_size: int) -> None:
    """Every process fits the same head to the same rows, then all train."""
    first, method, model = HeadFirst(rows=32), WeightLoRA(keep=3, after=4), model_without_dropout()
    made = sgd_trainer(folder / "head_first", first, method, model=model, batch_size=batch_size, max_steps=6)
    made.args.per_device_eval_batch_size = 8
    made.train()
    assert first.found is not None
    facts = {"kept": method.kept, "loss": first.found["loss_after"]}
    write(folder, "head_first", made.args.process_index, model, facts, made.args.world_size)


def train(folder: Path, name: str, method: Method, batch_size: int, find_unused: bool | None, **lora: Any) -> None:
    model = model_without_dropout(name, **lora) if name not in ("tied_lora", "s2_lora") else shared(name)
    trainer = sgd_trainer(
        folder / name, method, model=model, batch_size=batch_size, ddp_find_unused_parameters=find_unused
    )
    trainer.train()
    facts = {"kept": method.kept, "ranks": {a.name: a.r for a in list_adapters(model)}, "looks": looks(trainer)}
    facts["scores"] = [e["scores"] for e in method.events if name == "alora" and "scores" in e]
    write(folder, name, trainer.args.process_index, model, facts, trainer.args.world_size)


def looks(trainer: Trainer) -> bool | None:
    """Whether DDP still looks for parameters that a pass does not reach; None without DDP."""
    return getattr(trainer.model_wrapped, "find_unused_parameters", None)


def missing(folder: Path, method: Method, batch_size: int) -> None:
    """A part of the head that the first process never reaches."""
    model: Any = model_without_dropout()
    head = model.base_model.model.classifier.modules_to_save["default"]
    head.rarely = torch.nn.Parameter(torch.zeros(2))
    if os.environ.get("RANK") != "0":
        head.register_forward_hook(lambda module, _, out: out + module.rarely)
    trainer = sgd_trainer(folder / "missing", method, model=model, batch_size=batch_size, max_steps=8)
    trainer.train()
    rank = trainer.args.process_index
    (folder / f"missing-{rank}.json").write_text(json.dumps({"kept": len(method.kept), "looks": looks(trainer)}))


def shared(name: str) -> PeftModel:
    """Matrices that several layers use; of S2-LoRA's modules the third one's coefficients are 0 and stay so."""
    base = model_without_dropout().unload()
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "key", "value"], "task_type": "SEQ_CLS"}
    torch.manual_seed(0)
    model: Any = prepare(name, base, values)
    if name == "s2_lora":
        torch.nn.init.zeros_(model.base_model.model.bert.encoder.layer[0].attention.self.value.lora_B["default"].e)
    return model


def train_rest(folder: Path, name: str, batch_size: int, **options: Any) -> None:
    base = model_without_dropout().unload()
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "key", "value"], "task_type": "SEQ_CLS"}
    taken = {key: value for key, value in values.items() if methods.get_method(name).takes(key)}
    torch.manual_seed(0)
    data = {"batches": [batch(16)]} if methods.get_method(name).needs_data else {}
    model: Any = prepare(name, base, taken, **data, **options)
    started = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    method = methods.create(name, options)
    trainer = sgd_trainer(
        folder / name,
        *([] if method is None else [method]),
        model=model,
        batch_size=batch_size,
        max_steps=3,
        learning_rate=0.05,
    )
    trainer.train()
    ended = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    facts = {"moved": sorted(n for n in ended if n in started and not torch.equal(ended[n], started[n]))}
    write(folder, name, trainer.args.process_index, model, facts, trainer.args.world_size, state=ended)


def text_recipe(folder: Path, batch_size: int, **training: Any) -> Recipe:
    shared = folder.parent.parent / "text"
    own = {"per_device_train_batch_size": batch_size, "use_cpu": True, "eval_strategy": "no", **training}
    entries = {"method": {"name": "weightlora", "keep": 3, "after": 4}, "training": own}
    return parse_recipe(recipe(shared, output_dir=str(folder), **entries))


def command(folder: Path, batch_size: int) -> None:
    """The command's own path, which evaluates before it trains."""
    settings = {"optim": "sgd", "learning_rate": 0.3, "average_tokens_across_devices": False, "save_strategy": "no"}
    made = folder / "command"
    metrics = run(text_recipe(made, batch_size, max_steps=8, **settings))
    rank = int(os.environ.get("RANK", 0))
    facts = {
        "kept": metrics["adapters"]["kept"],
        "after": metrics["after"],
        "processes": 2 if "RANK" in os.environ else 1,
    }
    wait_for_all()
    save_file(load_file(made / "adapter/adapter_model.safetensors"), folder / f"command-{rank}.safetensors")
    (folder / f"command-{rank}.json").write_text(json.dumps(facts))


class Send(TrainerCallback):
    """A signal for this process alone, in the step after this one."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            signal.raise_signal(self.number)


def stopped(folder: Path) -> None:
    """One process is told to stop, and later both by Ctrl-C, as torchrun hands it on; all save in the same step."""
    rank, saves = int(os.environ["RANK"]), {"max_steps": 12, "save_strategy": "steps", "save_steps": 100}
    stopping._ASKED_EVERY = 2
    run(text_recipe(folder / "straight", 8, **saves))
    facts: list[Any] = []
    for sends in (Send(signal.SIGTERM, 3) if rank == 1 else TrainerCallback(), Send(signal.SIGINT, 7)):
        try:
            run(text_recipe(folder / "stopped", 8, **saves), callbacks=[sends], resume=bool(facts))
        except Stopped as ended:
            made = sorted(path.name for path in (folder / "stopped").glob("checkpoint-*"))
            facts.append([ended.signal, ended.step, made, str(last_checkpoint(folder / "stopped"))])
        wait_for_all()
    run(text_recipe(folder / "stopped", 8, **saves), resume=True)
    (folder / f"stopped-{rank}.json").write_text(json.dumps(facts))


def sgd_trainer(folder: Path, *callbacks: TrainerCallback, model: PeftModel, batch_size: int, **args: Any) -> Trainer:
    return make_trainer(
        folder,
        *callbacks,
        model=model,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        average_tokens_across_devices=False,
        optim="sgd",  # Adam would turn the last bit of a small gradient into a whole step
        **{"max_steps": 12, "learning_rate": 0.3, **args},
    )


def write(
    folder: Path,
    name: str,
    rank: int,
    model: PeftModel,
    facts: dict[str, Any],
    processes: int,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    save_file(trainable_state(model) if state is None else state, folder / f"{name}-{rank}.safetensors")
    (folder / f"{name}-{rank}.json").write_text(json.dumps(facts | {"processes": processes}))


if __name__ == "__main__":
    gc.freeze()  # as conftest.py does
    main(Path(sys.argv[1]), int(sys.argv[2]))
