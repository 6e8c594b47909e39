"""LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation (Zhou et al., COLING 2025).

There is no code of the authors. Models, modules, ranks and LoRA-drop's own settings are the paper's. Its learning
rates, epochs and batches could not be read: those here are of LoRA's own scripts for the same models and modules.
"""

from __future__ import annotations

from configs.tables import UNKNOWN, Because, Row, Table

PAPER = "LoRA-drop (Zhou et al. 2025)"
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
LIKE_LORA = (
    "Rates, epochs, batches, lengths, warm-up and weight decay are, unless said otherwise, those of LoRA's scripts "
    "(Hu et al. 2021), with the batch of one of their eight processes; the paper's own are not known here."
)
SEED = Because(0, UNKNOWN)

QUERY_VALUE = {
    "r": 8,
    "lora_alpha": Because(16, "as in LoRA's scripts"),
    "lora_dropout": Because(0.1, UNKNOWN),
    "target_modules": "query-value",
}
TRAINING = {"weight_decay": 0.1, "warmup_steps": Because(0.06, "of the run"), "lr_scheduler_type": "linear"}
REMEMBERED = "with epochs and batch from memory of LoRA's paper; no unchanged script was at hand"
# {task: (rate, epochs, batch)} of LoRA's scripts for RoBERTa-base; they start MRPC, STS-B and RTE from MNLI's adapter
BASE = {
    "cola": (Because(4e-4, REMEMBERED), 80, 32),
    "sst2": (Because(5e-4, REMEMBERED), 60, 16),
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
        "learning_rate": Because(2e-5, "of RoBERTa's own grid for GLUE"),
        "num_train_epochs": Because(10, "RoBERTa's own for GLUE"),
        "per_device_train_batch_size": 16,
    },
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


def lora_drop(**said) -> Row:
    return Row("lora_drop", "LoRA-drop, T = 0.9", LORA_DROP, **said)


ROBERTA_BASE = Table(
    "lora_drop/roberta_base",
    f"{PAPER}, RoBERTa-base",
    "FacebookAI/roberta-base",
    {
        f"glue/{task}": {
            "training": {"learning_rate": rate, "num_train_epochs": epochs, "per_device_train_batch_size": batch}
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
                "lambda2": Because(0.1, UNKNOWN),
                "scale_by_lr": Because(True, "as SoRA's paper has it"),
            },
            notes=("The printed 0.21M are about 137 of 192 ranks; how many stay follows from lambda2 and the data.",),
        ),
        Row(
            "vera",
            "VeRA",
            {"name": "vera", "r": 512},
            training={"learning_rate": Because(4e-3, f"ten times LoRA's: {UNKNOWN}")},
        ),
        Row(
            "tied_lora",
            "Tied-LoRA",
            {"name": "tied_lora", "fused": Because(True, "one A for query and value: the printed 0.15M")},
            lora={"r": 56, "lora_alpha": Because(112, "the scaling of the others")},
        ),
        lora_drop(
            others={**THRESHOLDS, **ABLATIONS},
            notes=("T = 0.95, 0.8 and 0.7 are Table 4's, the others the ablations':",),
        ),
    ),
    SEED,
    data={"max_length": 512},
    lora=QUERY_VALUE,
    training=TRAINING,
    notes=(LIKE_LORA,),
)

ROBERTA_LARGE = Table(
    "lora_drop/roberta_large",
    f"{PAPER}, RoBERTa-large",
    "FacebookAI/roberta-large",
    {f"glue/{task}": {} for task in GLUE},
    (FULL, LORA, lora_drop()),
    SEED,
    data={"max_length": 128},
    lora=QUERY_VALUE,
    training={
        **TRAINING,
        "learning_rate": 3e-4,
        "num_train_epochs": 10,
        "per_device_train_batch_size": Because(4, "all three as in LoRA's script for STS-B"),
    },
    notes=(LIKE_LORA,),
)

LLAMA = {"name": "meta-llama/Llama-2-7b-hf", "dtype": Because("bfloat16", UNKNOWN)}
LLAMA_TRAINING = {
    **TRAINING,
    "weight_decay": 0.0,
    "learning_rate": Because(2e-4, UNKNOWN),
    "num_train_epochs": Because(3, UNKNOWN),
    "per_device_train_batch_size": Because(16, UNKNOWN),
}

LLAMA_GLUE = Table(
    "lora_drop/llama2_glue",
    f"{PAPER}, Llama2-7b, understanding",
    LLAMA,
    {f"glue/{task}": {} for task in GLUE},
    (LORA, lora_drop()),
    SEED,
    data={"max_length": 512},
    lora={**QUERY_VALUE, "target_modules": Because("query-value", "64 modules, 4.2M parameters at rank 8")},
    training=LLAMA_TRAINING,
    notes=("That the tasks are those of RoBERTa is an assumption; rates, lengths of runs and batches are choices.",),
)

LLAMA_GENERATION = Table(
    "lora_drop/llama2_generation",
    f"{PAPER}, Llama2-7b, generation",
    LLAMA,
    {"e2e_nlg": {}, "dialogsum": {}, "gsm8k": {}},
    (LORA, lora_drop()),
    SEED,
    lora={
        "r": 64,
        "lora_alpha": Because(128, UNKNOWN),
        "lora_dropout": Because(0.1, UNKNOWN),
        "target_modules": Because(
            ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "192 modules, 0.13B parameters"
        ),
    },
    training=LLAMA_TRAINING,
    notes=("That the tasks are these three is an assumption; rates, lengths of runs and batches are choices.",),
)

TABLES = (ROBERTA_BASE, ROBERTA_LARGE, LLAMA_GLUE, LLAMA_GENERATION)
