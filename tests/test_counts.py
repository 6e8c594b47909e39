"""Attached modules and trained parameters of the models in the paper, on the meta device: shapes without weights.

One rank of an adapter costs d_in + d_out. Comments give the arithmetic; the numbers are those of the published tables.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from papers import bart_large, deberta_v3_base, llama_3_8b, roberta_base
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from weightlora import RLoRA, WeightLoRA, list_adapters
from weightlora.selection import After, Disconnect, Expand, RandomScore, Selector, Strategy
from weightlora.selection import parse_budget as parse

QKV = ["query_proj", "key_proj", "value_proj"]
OUTPUTS = "output.dense"  # of attention and of the feed-forward block


def with_lora(model: nn.Module, r: int, targets: list[str], task_type: str = "SEQ_CLS") -> PeftModel:
    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=r, target_modules=targets, task_type=task_type))


def counts(model: PeftModel) -> tuple[int, int, int]:
    """(LoRA layers, trained parameters of A and B, trained gates), without the task head and without our help."""
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n}
    gates = sum(size for name, size in trained.items() if ".lora_gate." in name)
    layers = {name.partition(".lora_A.")[0] for name in trained if ".lora_A." in name}
    return len(layers), sum(trained.values()) - gates, gates


@pytest.mark.parametrize(
    ("build", "targets", "task_type", "n", "one_rank"),
    [
        pytest.param(deberta_v3_base, QKV, "SEQ_CLS", 36, 36 * 1536, id="deberta-qkv"),
        # 48 square modules and 24 between 768 and 3072
        pytest.param(
            deberta_v3_base,
            [*QKV, "intermediate.dense", OUTPUTS],
            "SEQ_CLS",
            72,
            48 * 1536 + 24 * 3840,
            id="deberta-all",
        ),
        # what the misspelt `intermediate.dence` of the authors' filter leaves
        pytest.param(
            deberta_v3_base,
            [*QKV, OUTPUTS],
            "SEQ_CLS",
            60,
            48 * 1536 + 12 * 3840,
            id="deberta-without-intermediate",
        ),
        pytest.param(
            bart_large,
            ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
            "SEQ_2_SEQ_LM",
            192,
            540_672,
            id="bart",
        ),
        pytest.param(
            llama_3_8b,
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "CAUSAL_LM",
            224,
            2_621_440,
            id="llama",
        ),
        pytest.param(roberta_base, ["query", "value"], "SEQ_CLS", 24, 24 * 1536, id="roberta-qv"),
    ],
)
@pytest.mark.parametrize("r", [1, 8])
def test_adapters_and_gates_of_published_settings(build, targets, task_type, n, one_rank, r):
    model = with_lora(build(), r, targets, task_type)
    assert counts(model) == (n, r * one_rank, 0)
    method = WeightLoRA(keep=1).attach(model)
    assert counts(model) == (n, r * one_rank, n)
    assert sum(a.parameters for a in method.adapters) == r * one_rank


def test_table_1_lora():
    assert counts(with_lora(deberta_v3_base(), 8, QKV))[1] == 442_368
    assert counts(with_lora(roberta_base(), 8, ["query", "value"]))[1] == 294_912


def test_deberta_v3_base_is_the_model_of_the_paper():
    model = deberta_v3_base()
    assert sum(p.numel() for p in model.parameters()) == 184_423_682
    assert sum(isinstance(m, nn.Linear) for name, m in model.named_modules() if name != "classifier") == 73


@pytest.mark.parametrize(
    ("keep", "kept", "printed"), [(1, 12_288, 12_324), (5, 61_440, 61_476), (10, 122_880, 122_916)]
)
def test_table_1_weightlora(keep, kept, printed):
    """12.3K, 61.5K and 123K count the kept adapters and the gates of all 36."""
    model = with_lora(deberta_v3_base(), 8, QKV)
    method = RLoRA(keep=keep, after=0).attach(
        model
    )  # which K does not matter here, and values are not there to choose by
    assert counts(model) == (keep, kept, 0)
    assert len(method.dropped) == 36 - keep
    gated = with_lora(deberta_v3_base(), 8, QKV)
    WeightLoRA(keep=keep).attach(gated)
    assert kept + counts(gated)[2] == printed


def grown(model: PeftModel, keep: Any) -> PeftModel:
    """The model after a cut to `keep` random adapters that grow."""
    strategy = Strategy("test", None, RandomScore(), parse(keep), After(0), (Disconnect(), Expand("gaussian")))
    Selector(model, strategy)
    return model


def test_growth_restores_the_parameters_exactly_where_modules_are_equal():
    """36 adapters of rank 8 are 288 ranks: 3 survivors get 96 each, 5 get 58, 58, 58, 57, 57."""
    for keep, ranks in ((3, [96] * 3), (5, [57, 57, 58, 58, 58])):
        model = grown(with_lora(deberta_v3_base(), 8, QKV), keep)
        assert counts(model) == (keep, 442_368, 0)
        assert sorted(a.r for a in list_adapters(model)) == ranks


def test_growth_in_llama_misses_less_than_one_rank_of_the_smallest():
    model = grown(with_lora(llama_3_8b(), 8, ["q_proj", "k_proj", "gate_proj", "down_proj"], "CAUSAL_LM"), 20)
    before = 8 * 32 * (8192 + 5120 + 2 * 18432)
    missing = before - counts(model)[1]
    assert 0 <= missing < min(a.in_features + a.out_features for a in list_adapters(model))


def test_the_other_rows_of_the_papers_table_follow_from_the_same_modules():
    """AdaLoRA at its initial rank 12, LoRA-drop keeping half of the adapters, MELoRA at mini-rank 2."""

    def trained(model: nn.Module) -> int:
        return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name and p.requires_grad)

    adalora = AdaLoraConfig(init_r=12, target_r=8, total_step=10, target_modules=QKV)
    assert trained(get_peft_model(deberta_v3_base(), adalora)) == 36 * 12 * (2 * 768 + 1) == 663_984
    half = get_peft_model(deberta_v3_base(), LoraConfig(r=8, target_modules=QKV))
    RLoRA(keep=0.5, after=0).attach(half)
    assert trained(half) == 18 * 8 * 2 * 768 == 221_184
    mini = get_peft_model(deberta_v3_base(), LoraConfig(r=2, target_modules=QKV))
    assert trained(mini) == 36 * 2 * 2 * 768 == 110_592
