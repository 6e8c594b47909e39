"""LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation (Zhou et al., COLING 2025).

There is no code of the authors. Models, modules, ranks, metrics and LoRA-drop's own settings are the paper's. It prints
no learning rates, epochs and batches, and says that its LoRA is set up as by Hu et al. (2021): those of LoRA's own
scripts for the same models and modules are taken.
"""

from __future__ import annotations

from configs.tables import UNKNOWN, Because, Row, Table, choice

PAPER = "LoRA-drop (Zhou et al. 2025)"
# {task: what the paper scores it by, and the best epoch of a run with it}
METRICS = {
    "cola": "matthews",
    "sst2": "accuracy",
    "mrpc": "accuracy",
    "stsb": "spearman",
    "qqp": "accuracy",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
}
# over the sentences of both together
MNLI = {"validation": {"split": "validation_matched+validation_mismatched"}, "test": False}
GLUE = {
    f"glue/{task}": {"metric": metric, **({"data": MNLI} if task == "mnli" else {})} for task, metric in METRICS.items()
}
LIKE_LORA = (
    "Rates, epochs, batches, lengths, warm-up and weight decay are, unless said otherwise, those of LoRA's scripts "
    "(Hu et al. 2021), with the batch of one of their eight processes: the paper prints none and names their set-up."
)
SEED = choice(0, "the paper averages three, and names none")
SEEDS = (0, 1, 2)
BEST = {"load_best_model_at_end": Because(True, "the best result of each run counts, by `metric`")}

QUERY_VALUE = {
    "r": 8,
    "lora_alpha": choice(16, "as in LoRA's scripts"),
    "lora_dropout": choice(0.1),
    "target_modules": "query-value",
}
TRAINING = {
    "weight_decay": choice(0.1, "as in LoRA's scripts"),
    "warmup_steps": choice(0.06, "of the run, as in LoRA's scripts"),
    "lr_scheduler_type": choice("linear", "as in LoRA's scripts"),
}
OF_LORA = "as in LoRA's scripts"
REMEMBERED = "with epochs and batch from memory of LoRA's paper; no unchanged script was at hand"
# {task: (rate, epochs, batch)} of LoRA's scripts for RoBERTa-base; they start MRPC, STS-B and RTE from MNLI's adapter
BASE = {
    "cola": (4e-4, 80, 32),
    "sst2": (5e-4, 60, 16),
    "mrpc": (4e-4, 30, 16),
    "stsb": (4e-4, 40, 16),
    "qqp": (5e-4, 25, 16),
    "mnli": (5e-4, 30, 16),
    "qnli": (4e-4, 25, 32),
    "rte": (5e-4, 80, 32),
}

LORA = Row("lora", "LoRA", {"name": "lora"})
FULL = Row(
    "full",
    "full fine-tuning",
    {"name": "full"},
    training={
        "learning_rate": choice(2e-5, "of RoBERTa's own grid for GLUE; the paper copies RoBERTa's results"),
        "num_train_epochs": choice(10, "RoBERTa's own for GLUE"),
        "per_device_train_batch_size": choice(16, "RoBERTa's own for GLUE"),
    },
    has_adapters=False,
)
FULL_LLAMA = Row(
    "full",
    "full fine-tuning",
    {"name": "full"},
    training={"learning_rate": choice(1e-5, "usual for a model of this size")},
    has_adapters=False,
)
LORA_DROP = {
    "name": "lora_drop",
    "threshold": 0.9,
    "sample": Because(0.1, "of the training data, for phase 1"),
    "epochs": Because(3, "of phase 1"),
}
THRESHOLDS = {f"T = {t}": f"method.threshold={t}" for t in (0.95, 0.8, 0.7)}
ABLATIONS = {
    "without sharing": "method.share=false",
    "the important ones share": "method.choose=inverted",
    "random modules": "method.choose=random",
    "the top layers": "method.choose=top_layers",
}
FOR_INFERENCE = {f"LoRA, only the {size} I left in": f"method.keep_for_inference={size}" for size in ("large", "small")}


def lora_drop(**said) -> Row:
    return Row("lora_drop", "LoRA-drop, T = 0.9", LORA_DROP, **said)


ROBERTA_BASE = Table(
    "lora_drop/roberta_base",
    f"{PAPER}, Tables 1 and 3 to 5, RoBERTa-base",
    "FacebookAI/roberta-base",
    {
        f"glue/{task}": {
            **GLUE[f"glue/{task}"],
            "training": {
                "learning_rate": choice(rate, REMEMBERED if task in ("cola", "sst2") else OF_LORA),
                "num_train_epochs": choice(epochs, OF_LORA),
                "per_device_train_batch_size": choice(batch, OF_LORA),
            },
        }
        for task, (rate, epochs, batch) in BASE.items()
    },
    (
        FULL,
        LORA,
        Row(
            "sparse_adapter",
            "SparseAdapter",
            {"name": "sparse_adapter", "density": 0.5, "score": "snip"},
            notes=("SNIP says nothing while B is 0, so a few steps of warm-up come first.",),
        ),
        Row(
            "sora",
            "SoRA",
            {
                "name": "sora",
                "lambda2": choice(0.1),
                "scale_by_lr": choice(True, "as SoRA's paper has it"),
            },
            notes=("The printed 0.21M are about 137 of 192 ranks; how many stay follows from lambda2 and the data.",),
        ),
        Row(
            "vera",
            "VeRA",
            {"name": "vera", "r": 512},
            training={"learning_rate": choice(4e-3, f"ten times LoRA's; {UNKNOWN}")},
        ),
        Row(
            "tied_lora",
            "Tied-LoRA",
            {"name": "tied_lora", "fused": Because(True, "one A for query and value: the printed 0.15M")},
            lora={"r": 56, "lora_alpha": choice(112, "the scaling of the others")},
        ),
        lora_drop(
            others={**THRESHOLDS, **ABLATIONS, **FOR_INFERENCE},
            notes=(
                "T = 0.95, 0.8 and 0.7 are Table 4's; LoRA with adapters left out after training is Table 3's, where "
                "the paper takes the number of adapters from Table 1 and this the threshold on the trained LoRA; the "
                "others are the ablations of Table 5:",
            ),
        ),
    ),
    SEED,
    SEEDS,
    data={"max_length": choice(512, OF_LORA)},
    lora=QUERY_VALUE,
    training={**TRAINING, **BEST},
    notes=(LIKE_LORA,),
)

ROBERTA_LARGE = Table(
    "lora_drop/roberta_large",
    f"{PAPER}, Table 6, RoBERTa-large",
    "FacebookAI/roberta-large",
    GLUE,
    (FULL, LORA, lora_drop()),
    SEED,
    SEEDS,
    data={"max_length": choice(128, OF_LORA)},
    lora=QUERY_VALUE,
    training={
        **TRAINING,
        **BEST,
        "learning_rate": choice(3e-4, "as in LoRA's script for STS-B"),
        "num_train_epochs": choice(10, "as in LoRA's script for STS-B"),
        "per_device_train_batch_size": choice(4, "as in LoRA's script for STS-B"),
    },
    notes=(LIKE_LORA,),
)

LLAMA = {"name": "meta-llama/Llama-2-7b-hf", "dtype": choice("bfloat16")}
LLAMA_TRAINING = {
    **TRAINING,
    "weight_decay": choice(0.0),
    "learning_rate": choice(2e-4),
    "num_train_epochs": choice(3),
    "per_device_train_batch_size": choice(16),
}

LLAMA_GLUE = Table(
    "lora_drop/llama2_glue",
    f"{PAPER}, Table 7, Llama2-7b",
    LLAMA,
    GLUE,
    (FULL_LLAMA, LORA, lora_drop()),
    SEED,
    SEEDS,
    data={"max_length": choice(512, "as for RoBERTa")},
    lora={**QUERY_VALUE, "target_modules": Because("query-value", "64 modules, 4.2M parameters at rank 8")},
    training={**LLAMA_TRAINING, **BEST},
    notes=("Rates, lengths of runs and batches are choices; the paper prints none for Llama.",),
)

LLAMA_GENERATION = Table(
    "lora_drop/llama2_generation",
    f"{PAPER}, Tables 2 and 8, Llama2-7b",
    LLAMA,
    {"e2e_nlg": {}, "dart": {}, "dialogsum": {}, "gsm8k": {}},
    (FULL_LLAMA, LORA, lora_drop()),
    SEED,
    SEEDS,
    lora={
        "r": 64,
        "lora_alpha": choice(128, "the scaling of the others"),
        "lora_dropout": choice(0.1),
        "target_modules": Because(
            ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "192 modules, 0.13B parameters"
        ),
    },
    training=LLAMA_TRAINING,
    notes=(
        "Rates, lengths of runs and batches are choices; the paper prints none for Llama. The last epoch counts: the "
        "paper says that the best one does of understanding, and to write all texts after each epoch takes longer than "
        "to train.",
    ),
)

_ROW = "configs/lora_drop/roberta_base/{}_lora_drop.yaml"
# {what the paper prints: the command that makes it here, or why there is none}
SHOWN = {
    "Tables 1, 3, 4 and 5": "`weightlora bench suites/lora_drop/roberta_base.yaml`",
    "Tables 2 and 8": "`weightlora bench suites/lora_drop/llama2_generation.yaml`",
    "Table 6": "`weightlora bench suites/lora_drop/roberta_large.yaml`",
    "Table 7": "`weightlora bench suites/lora_drop/llama2_glue.yaml`",
    "Figures 1 and 3": "drawings",
    "Figures 2 and 6 (RTE)": f"`weightlora figure outputs {_ROW.format('rte')} OUT`",
    "Figures 7 and 8 (MRPC)": f"`weightlora figure outputs {_ROW.format('mrpc')} OUT`",
    "Figure 4": f"`weightlora figure importance {_ROW.format('*')} OUT`",
    "Figures 5 and 12": f"`weightlora figure samples {_ROW.format('rte')} OUT`",
    "Figures 9 and 10": f"`weightlora figure outputs {_ROW.format('rte')} OUT --after-sharing method.sample=0.2 "
    "method.epochs=4`",
    "Figure 11": "`weightlora figure importance configs/lora_drop/llama2_glue/*_lora_drop.yaml OUT`",
}
TABLES = (ROBERTA_BASE, ROBERTA_LARGE, LLAMA_GLUE, LLAMA_GENERATION)
