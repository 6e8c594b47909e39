"""The models that are measured: an encoder and a decoder of fixed size, random weights, in every way of training them.

A `Shape` says how large; `frozen`, `full`, `stock`, `scouting` and `kept` each make a `Loop` from it: a model in train
mode, its batch and its optimizer. Two loops of one shape start from equal weights and see the same batch.
"""

from __future__ import annotations

import copy
import functools
import os
import platform
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from weightlora import Method, ReusePrefix, WeightLoRA, WeightLoRAPlus, list_adapters

RANK = 8
DROPOUT = 0.05
LEARNING_RATE = 1e-4
KEPT = 5


@dataclass(frozen=True)
class Shape:
    """Size of a model and of its batch.

    Attributes:
        blocks: where the model keeps its list of blocks. Adapters go on every linear layer in there.
        head: the layer on top; `trains_head` tells whether PEFT trains it beside the adapters.
        checkpointing: activations are computed again in backward, block by block.
        dtype: of the base model; in half precision the step runs under autocast, as under `Trainer(bf16=True)`, and
            PEFT keeps the adapters in float32.
    """

    name: str
    model_class: str
    task_type: str
    blocks: str
    head: str
    trains_head: bool
    batch: int
    length: int
    config: dict[str, Any] = field(hash=False)
    checkpointing: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def depth(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def third(self) -> int:
        """The first block of the top third."""
        return self.depth - max(1, self.depth // 3)

    @property
    def caption(self) -> str:
        """The size, in one line for people."""
        c, again = self.config, ", checkpointing" if self.checkpointing else ""
        dropout = c.get("hidden_dropout_prob", 0.0)
        return (
            f"{self.name}: {self.depth} blocks, d={c['hidden_size']}, batch {self.batch}x{self.length}{again}; "
            f"r={RANK}, lora_dropout {DROPOUT}; base model in train mode with its own dropout of {dropout}; AdamW"
        )


def _bert(batch: int, length: int, **config: int) -> Shape:
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "use_cache": False}
    model = ("BertForSequenceClassification", "SEQ_CLS", "bert.encoder.layer", "classifier")
    return Shape("bert", *model, True, batch, length, {**config, **dropout})


def _llama(batch: int, length: int, **config: int) -> Shape:
    model = ("LlamaForCausalLM", "CAUSAL_LM", "model.layers", "lm_head")
    return Shape("llama", *model, False, batch, length, {**config, "use_cache": False})


_BERT = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
_LLAMA = {
    "num_hidden_layers": 12,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1408,
}
_SMALL = {"num_hidden_layers": 6, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def _named(*shapes: Shape) -> dict[str, Shape]:
    return {shape.name: shape for shape in shapes}


def _with_checkpointing(shape: Shape) -> Shape:
    return replace(shape, name=f"{shape.name}_checkpointing", checkpointing=True)


_FULL_LLAMA = _llama(4, 256, vocab_size=32_000, **_LLAMA)
_QUICK_LLAMA = _llama(2, 16, vocab_size=100, num_key_value_heads=2, **_SMALL)

SHAPES = _named(_bert(32, 64, **_BERT), _FULL_LLAMA, _with_checkpointing(_FULL_LLAMA))
QUICK = _named(_bert(4, 16, vocab_size=100, **_SMALL), _QUICK_LLAMA, _with_checkpointing(_QUICK_LLAMA))


_DEBERTA = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_LLAMA_1B = {
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
}
_LLAMA_8B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
}


def _deberta(batch: int, length: int, **config: Any) -> Shape:
    """DeBERTaV3, whose attention knows relative positions."""
    positions = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 256,
    }
    rest = {"norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = ("DebertaV2ForSequenceClassification", "SEQ_CLS", "deberta.encoder.layer", "classifier")
    return Shape("deberta", *model, True, batch, length, {**positions, **rest, **dropout, **config})


def for_gpu(device: str, *, quick: bool = False) -> dict[str, Shape]:
    """The shapes that are measured on a GPU: DeBERTaV3-base, and Llama's of 1 and 8 billion weights."""
    where = {"device": device, "dtype": torch.bfloat16}
    if quick:
        small = {"vocab_size": 100, **_SMALL}
        encoder, one, eight = _deberta(4, 16, **small), _QUICK_LLAMA, _QUICK_LLAMA
    else:
        encoder = _deberta(32, 128, vocab_size=128_100, **_DEBERTA)
        one, eight = (_llama(8, 512, vocab_size=128_256, **size) for size in (_LLAMA_1B, _LLAMA_8B))
    eight = replace(eight, name="llama_8b", **where)
    one = replace(one, name="llama_1b", **where)
    return _named(eight, _with_checkpointing(eight), replace(encoder, **where), one)


@dataclass(eq=False)
class Loop:
    """A training loop that does the same step again and again.

    Attributes:
        optimizer: None where nothing is trained.
        method: its two calls belong to the step while it is selecting.
        after_step: what else the way of training asks for after the optimizer's step.
        modules: names of the adapted modules.
        reuse: at work in the model's forward pass.
    """

    model: nn.Module
    batch: dict[str, Tensor]
    optimizer: torch.optim.Optimizer | None = None
    method: Method | None = None
    after_step: Callable[[], object] | None = None
    modules: Sequence[str] = ()
    reuse: ReusePrefix | None = None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    def forward(self) -> Tensor:
        """The loss of the batch."""
        with self.autocast():
            return self.model(**self.batch).loss

    def step(self) -> None:
        """Forward, backward, optimizer step, zero_grad."""
        self.forward().backward()
        if self.method is not None:
            self.method.observe(self.optimizer)
        if self.optimizer is not None:
            self.optimizer.step()
        if self.method is not None:
            self.method.step(self.optimizer)
        if self.after_step is not None:
            self.after_step()
        if self.optimizer is not None:
            self.optimizer.zero_grad()


# ---- Ways of training ----------------------------------------------------------------------------------------


def frozen(shape: Shape, *, backward_from: int | None = None, head: bool | None = None) -> Loop:
    """No adapter anywhere; backward goes down to the input of block `backward_from`, or to the head only.

    Args:
        head: whether the head is trained. Default: as PEFT does with this kind of model.
    """
    trains = shape.trains_head if head is None else head
    model = base_model(shape, own=shape.head if trains else None).requires_grad_(False)
    if shape.checkpointing:
        model.disable_input_require_grads()  # a floor, so backward must not go further than asked for
    model.get_submodule(shape.head).requires_grad_(trains)
    if backward_from is not None:
        block = model.get_submodule(shape.blocks)[backward_from]  # type: ignore[index]
        block.register_forward_pre_hook(lambda _, args: (args[0].detach().requires_grad_(), *args[1:]))
    return _loop(model, shape)


def full(shape: Shape) -> Loop:
    """Full fine-tuning."""
    return _loop(base_model(shape, own=""), shape)


def stock(
    shape: Shape,
    modules: Sequence[str] | None = None,
    *,
    checkpointing: bool = False,
    half_adapters: bool = False,
    **lora: Any,
) -> Loop:
    """Stock PEFT's LoRA on every linear layer of the blocks, or on `modules` only.

    Args:
        half_adapters: adapters in the dtype of the base model, and no autocast.
        lora: changes to the `LoraConfig`.
    """
    config = LoraConfig(**{**_lora(shape, modules), **lora})
    model = get_peft_model(base_model(shape, checkpointing), config, autocast_adapter_dtype=not half_adapters)
    loop = replace(_loop(model, shape), modules=_adapted(model))
    return replace(loop, autocast=nullcontext) if half_adapters else loop


def adalora(shape: Shape) -> Loop:
    """Stock PEFT's AdaLoRA before it takes ranks away: starts at 3/2 of the rank, importances updated at every step."""
    ranks = {"init_r": RANK * 3 // 2, "target_r": RANK, "tinit": 500_000, "total_step": 1_000_000}
    config = AdaLoraConfig(**{k: v for k, v in _lora(shape, None).items() if k != "r"}, **ranks)
    model: Any = get_peft_model(base_model(shape), config)
    loop = _loop(model, shape)
    loop.after_step = lambda: model.base_model.update_and_allocate(1)
    return loop


def scouting(shape: Shape, **lora: Any) -> Loop:
    """Ours before the cut, at its most expensive: every gate stays open, so every adapter is trained at every step."""
    loop = stock(shape, **lora)
    last = 10**9
    method = WeightLoRA(keep=len(loop.modules), after=last, gate_lr=1e-9).attach(loop.model)
    method.plan(total_steps=last + 1)
    return replace(loop, optimizer=_adamw(loop.model), method=method)


def kept(
    shape: Shape,
    modules: Sequence[str],
    *,
    checkpointing: bool = False,
    reuse_prefix: bool = False,
    method: type[WeightLoRA | WeightLoRAPlus] = WeightLoRA,
) -> Loop:
    """Ours after the cut: all adapters for two steps, then the gates of `modules` are the largest and the cut comes.

    What is left is an ordinary loop: the method has nothing more to do in it. With `reuse_prefix` the batch's hidden
    states are stored already, as they are from the second epoch on.
    """
    loop = stock(shape, checkpointing=checkpointing)
    at_work = method(keep=len(modules), after=2, gate_lr=1e-9).attach(loop.model)
    at_work.plan(total_steps=3)
    start = replace(loop, batch={k: v[:2] for k, v in loop.batch.items()}, optimizer=_adamw(loop.model), method=at_work)
    for _ in range(2):
        _set_gates(loop.model, modules)
        start.step()
    if set(at_work.kept) != set(modules) or not at_work.engine.done:
        raise RuntimeError(f"the cut kept {at_work.kept} where {list(modules)} were wanted")
    loop = replace(loop, optimizer=start.optimizer, modules=_adapted(loop.model))
    if reuse_prefix:
        loop.reuse = ReusePrefix().attach(loop.model)
        loop.forward()
    return loop


def after_cut(
    keep: int | float, first_block: Callable[[Shape], int] = lambda _: 0, **options: Any
) -> Callable[[Shape], Loop]:
    """Ours after a cut to `keep` adapters (a number, or a share of all), spread over `first_block(shape)` and above."""

    def build(shape: Shape) -> Loop:
        names = adapted_modules(shape, first_block=first_block(shape))
        wanted = keep if isinstance(keep, int) else max(1, round(keep * len(adapted_modules(shape))))
        return kept(shape, spread(names, min(wanted, len(names))), **options)

    return build


def top_third(shape: Shape) -> int:
    """Its first block."""
    return shape.third


def last_block(shape: Shape) -> int:
    """Its number."""
    return shape.depth - 1


class _DenseProduct(nn.Module):
    """The WeightLoRA authors' layer: x (W + omega s A B), the product of A and B made whole in every forward pass."""

    def __init__(self, base: nn.Linear, r: int, scaling: float) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.base, self.scaling = base, scaling
        self.A = nn.Parameter(torch.randn(base.in_features, r, **like) / r)
        self.B = nn.Parameter(torch.zeros(r, base.out_features, **like))
        self.omega = nn.Parameter(torch.ones(1, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (self.omega * self.scaling * (x @ (self.A @ self.B))).to(self.base.weight.dtype)


def dense_product(shape: Shape) -> Loop:
    """The authors' layer in place of every linear layer of the blocks."""
    model = base_model(shape).requires_grad_(False)
    for name in adapted_modules(shape):
        model.set_submodule(name, _DenseProduct(model.get_submodule(name), RANK, 2.0))
    return _loop(model, shape)


# ---- Which adapters survive ----------------------------------------------------------------------------------


def adapted_modules(shape: Shape, *, first_block: int = 0) -> list[str]:
    """Names of the linear layers in block `first_block` and those above it, from the bottom up."""
    prefixes = tuple(f"{shape.blocks}.{i}." for i in range(first_block, shape.depth))
    named = _original(shape).named_modules()
    return [name for name, module in named if isinstance(module, nn.Linear) and name.startswith(prefixes)]


def spread(names: Sequence[str], k: int) -> list[str]:
    """k of the names, spread evenly, the k + 1 of the next call among them: each is the farthest from those before."""
    chosen: list[int] = []
    for _ in range(k):
        free = [i for i in range(len(names)) if i not in chosen]
        middle = len(names) // 2
        far = [min((abs(i - j) for j in chosen), default=-abs(i - middle)) for i in free]
        chosen.append(free[far.index(max(far))])
    return [names[i] for i in sorted(chosen)]


def machine() -> dict[str, Any]:
    """Facts that times depend on."""
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpus": os.cpu_count()}
    return {**facts, "python": platform.python_version(), "processor": platform.machine()}


# ---- Parts ---------------------------------------------------------------------------------------------------


def base_model(shape: Shape, checkpointing: bool = False, *, own: str | None = None) -> Any:
    """A copy of the base model in train mode, the same weights every time.

    Args:
        own: the submodule that has weights of its own, "" for all. The other weights are shared with every copy, so
            that a model of 16 GB fits many times; nobody may train them.
    """
    original = _original(shape)
    owned = set() if own is None else {id(p) for p in original.get_submodule(own).parameters()}
    shared = {id(p): p for p in original.parameters() if id(p) not in owned}
    model = copy.deepcopy(original, shared).train()
    if checkpointing or shape.checkpointing:
        # transformers 5.20 renamed it
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    return model


def _original(shape: Shape) -> Any:
    return _pristine(replace(shape, name="", checkpointing=False))


@functools.lru_cache(maxsize=4)
def _pristine(shape: Shape) -> transformers.PreTrainedModel:
    model_class = getattr(transformers, shape.model_class)
    torch.manual_seed(0)
    with torch.device(shape.device):
        return model_class._from_config(model_class.config_class(**shape.config), dtype=shape.dtype)


def forget() -> None:
    """Let go of the base models that were made."""
    _pristine.cache_clear()


def _batch(shape: Shape, vocabulary: int) -> dict[str, Tensor]:
    """Random tokens without padding; labels are classes, or the tokens themselves."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocabulary, (shape.batch, shape.length), generator=random)
    labels = torch.randint(0, 2, (shape.batch,), generator=random) if shape.trains_head else ids.clone()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: values.to(shape.device) for name, values in batch.items()}


def _lora(shape: Shape, modules: Sequence[str] | None) -> dict[str, Any]:
    names = adapted_modules(shape) if modules is None else modules
    targets = "|".join(re.escape(name) for name in names)  # the blocks only: "dense" would match BERT's pooler as well
    task = {"task_type": shape.task_type, "target_modules": targets}
    return {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": DROPOUT, **task}


def _loop(model: Any, shape: Shape) -> Loop:
    trains = any(parameter.requires_grad for parameter in model.parameters())
    loop = Loop(model.train(), _batch(shape, model.config.vocab_size), _adamw(model) if trains else None)
    if shape.dtype.itemsize < 4:
        loop.autocast = functools.partial(torch.autocast, torch.device(shape.device).type, shape.dtype)
    return loop


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def _adapted(model: nn.Module) -> list[str]:
    return [adapter.name for adapter in list_adapters(model)]


@torch.no_grad()
def _set_gates(model: nn.Module, modules: Sequence[str]) -> None:
    for adapter in list_adapters(model):
        if adapter.gate is not None:
            adapter.gate.fill_(1.0 if adapter.name in modules else 0.5)
