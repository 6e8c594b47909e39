"""What `LoraConfig` says beside names of linear layers: tied weights, rows of an embedding, some or repeated layers.

Each works from the start of a run to stock PEFT and to an export, or is refused in one message.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from test_others import CASES, HEADS, SIZE, go_on, of_transformers, outputs, randomise
from test_others import Case as Targets
from torch import nn

from weightlora import ConfigError, UnsupportedError, WeightLoRA, export, list_adapters

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft's own, of tied weights and saved embeddings
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
LLAMA = of_transformers("LlamaForCausalLM", **{**SIZE, "num_hidden_layers": 3}, **HEADS, tie_word_embeddings=True)
MERGING_TIED = r"share their weights \(`tie_word_embeddings`\), so merging.*without merged"
ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}

# name: (LoraConfig, what a merged export is refused with)
TARGETS: dict[str, tuple[dict[str, Any], str | None]] = {
    "lm_head": ({"target_modules": ["q_proj", "lm_head"]}, MERGING_TIED),
    "embed_tokens": ({"target_modules": ["q_proj", "embed_tokens"]}, MERGING_TIED),
    "both": ({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, MERGING_TIED),
    "lm_head saved": ({**ATTENTION, "modules_to_save": ["lm_head"]}, None),
    "embed_tokens saved": ({**ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, None),
    "both saved": ({**ATTENTION, "modules_to_save": ["lm_head", "embed_tokens"]}, None),
    "rows": ({**ATTENTION, "trainable_token_indices": [1, 2, 5]}, None),
    "some layers": ({**ATTENTION, "layers_to_transform": [1, 2], "layers_pattern": "layers"}, None),
    "but these": ({**ATTENTION, "exclude_modules": ["layers.0.self_attn.q_proj"]}, None),
    "but such": ({**ATTENTION, "exclude_modules": r".*layers\.0\..*"}, None),
    "all but such": ({"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"}, None),
    "layers twice": ({**ATTENTION, "layer_replication": [[0, 2], [1, 3]]}, "`layer_replication`.*without merged"),
}


def begin(base: nn.Module, case: Targets) -> tuple[Any, WeightLoRA]:
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **case.config))
    method = WeightLoRA(keep=3, after=4, largest="magnitude")
    return model.train(), method.attach(model)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("name", TARGETS)
def test_it_is_trained_cut_resumed_and_exported(name, tmp_path: Path):
    config, refusal = TARGETS[name]
    case = Targets(LLAMA, config, set())
    model_class: Any = transformers.LlamaForCausalLM
    case.base().save_pretrained(tmp_path / "base")  # type: ignore[operator]

    def base() -> Any:
        return model_class.from_pretrained(tmp_path / "base")

    model, method = begin(base(), case)
    optimizer = optimizer_of(model)
    method.plan(8)
    seen = go_on(model, method, optimizer, case, tmp_path, 1, 3)
    moments = copy.deepcopy(optimizer.state_dict())
    seen |= go_on(model, method, optimizer, case, tmp_path, 4, 8)
    assert len(list_adapters(model, linear=False)) == 3
    for step, expected in seen.items():
        again = PeftModel.from_pretrained(base(), str(tmp_path / str(step))).eval()
        torch.testing.assert_close(outputs(again, case), expected, rtol=0, atol=1e-5)

    again, resumed = begin(base(), case)
    again.load_adapter(str(tmp_path / "3"), "default", is_trainable=True)
    optimizer = optimizer_of(again)
    optimizer.load_state_dict(moments)
    resumed.plan(8)
    go_on(again, resumed, optimizer, case, tmp_path, 4, 8)
    torch.testing.assert_close(dict(again.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)

    export(tmp_path / "8", tmp_path / "stock")
    if refusal is None:
        export(tmp_path / "8", tmp_path / "merged", merged=True)
        torch.testing.assert_close(
            outputs(model_class.from_pretrained(tmp_path / "merged"), case), seen[8], rtol=0, atol=1e-5
        )
    else:
        with pytest.raises(ConfigError, match=refusal):
            export(tmp_path / "8", tmp_path / "merged", merged=True)


def test_adapters_that_share_their_factors_are_refused():
    case = Targets(LLAMA, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, set())
    with pytest.raises(UnsupportedError, match=r"embed_tokens and lm_head share their factors.*`ensure_weight_tying`"):
        begin(case.base(), case)


BERT = of_transformers("BertForSequenceClassification", **SIZE)
VIT = of_transformers("ViTForImageClassification", **SIZE, image_size=8, patch_size=4)
EXPORTS = {
    "embeddings": Targets(BERT, {"target_modules": ["query", "word_embeddings", "position_embeddings"]}, set()),
    "nothing but embeddings": Targets(BERT, {"target_modules": ["word_embeddings"]}, set()),
    "images": Targets(VIT, {"target_modules": ["projection", "q_proj"]}, set()),
    "experts": CASES["qwen"],
    "sound": CASES["wav2vec2"],
    "spectra": Targets(CASES["whisper"].build, {"target_modules": ["q_proj", "fc1"]}, set()),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_checked_whatever_the_model_reads(name, tmp_path: Path):
    case = EXPORTS[name]
    base: Any = case.base()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), LoraConfig(r=4, **case.config))
    randomise(model)
    model.save_pretrained(str(tmp_path / "run"))
    export(tmp_path / "run", tmp_path / "stock")
    export(tmp_path / "run", tmp_path / "merged", merged=True)
    if name != "spectra":  # which has linear layers alone
        with pytest.raises(ConfigError, match=r"not linear|`target_parameters`"):
            export(tmp_path / "run", tmp_path / "portable", portable=True)
