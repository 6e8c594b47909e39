"""WeightLoRA: Keep Only Necessary Adapters (Veprikov, Solodkin, Zyl, Savchenko, Beznosikov, 2025), Tables 1 to 6.

"The scripts" are those of the authors' repository. Where they and the paper differ, the paper is followed, and what
the scripts do is an override at the head of each file.
"""

from __future__ import annotations

from configs.tables import Because, Row, Table, choice, scripts

PAPER = "WeightLoRA (Veprikov et al. 2025)"
GLUE = ("glue/cola", "glue/sst2", "glue/mrpc", "glue/qqp", "glue/mnli", "glue/qnli", "glue/rte")
DEBERTA = "microsoft/deberta-v3-base"
LLAMA = {
    "name": Because("meta-llama/Meta-Llama-3-8B", "'Llama3 8B' and, elsewhere in the paper, 'Llama3-7B'"),
    "dtype": choice("bfloat16"),
}

SEED = scripts(18, "one of the scripts' 18, 52 and 1917; the paper averages five")
SEEDS = (18, 52, 1917, 0, 1)
HEAD = "The task head is trained too, from scratch; the scripts freeze it at random."
RANKS = {f"r = {r}": f"lora.r={r}" for r in (1, 2, 4)}

# The grids of appendix B.
NARROW = (5e-5, 5e-4, 5e-3)
WIDE = (1e-6, 3e-5, 5e-5, 8e-5, 1e-4, 3e-4, 5e-4, 8e-4, 1e-3)  # of question answering and generation
WIDEST = (*WIDE, 5e-3)  # of Tables 2 and 3
WARM_UP = (0, 20, 50, 70, 100, 200)

# What all tables share.
LORA = {
    "r": 8,
    "lora_alpha": 32,
    "lora_dropout": Because(
        0.05, "as LoRA-dropout (Lin et al. 2024) in the paper, which drops rows of A and B; on x here"
    ),
}
LINEAR = Because("block-linear", "72, as the paper says; the printed shares fit the 60 of the scripts' misspelt filter")
TRAINING = {
    "weight_decay": Because(0.0, "Adam's own: what the paper does not tune is at its default"),
    "lr_scheduler_type": "linear",
}
ACCUMULATED = {"gradient_accumulation_steps": 6}

# T: after how many steps adapters are dropped.
CUT = choice(None, "the paper bounds T by an epoch, the scripts never cut; a tenth of the run and at most an epoch")
# In mode `paper` omega takes SGD steps at 5.0, the scripts' rate; the paper states none.
GATES = {"mode": "paper"}


def lora(**said) -> Row:
    return Row("lora", "LoRA, r = 8", {"name": "lora"}, others=RANKS, **said)


def weightlora(keep: int, **said) -> Row:
    method = {"name": "weightlora", "keep": keep, "after": CUT, **GATES}
    return Row("weightlora", f"WeightLoRA, K = {keep}, r = 8", method, others=RANKS, **said)


def weightlora_plus(last_cut: int, **said) -> Row:
    """Two halvings, at half of the last cut and at it."""
    method = {
        "name": "weightlora_plus",
        "keep": scripts(None, "halves the adapters in each round"),
        "rounds": scripts(2),
        "after": scripts(last_cut, "the scripts' step of the second halving; the paper states none"),
        **GATES,
    }
    return Row("weightlora_plus", "WeightLoRA+, r = 8 at the start", method, others=RANKS, **said)


def by_task(*rates: float, tasks: tuple[str, ...] = GLUE) -> dict[str, Because]:
    """The authors' rates, all of them points of the paper's grid."""
    why = "of the paper's grid, tuned by the authors: tuned_params.json of their repository"
    return {task: scripts(rate, why) for task, rate in zip(tasks, rates, strict=True)}


def warm(steps: int) -> Because:
    return scripts(steps, "of the paper's grid, as in the scripts")


# -- Table 1 and its ablation ----------------------------------------------------------------------------------------

ONE_EPOCH = {
    **TRAINING,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    **ACCUMULATED,
    "warmup_steps": Because(100, "the whole epoch of CoLA, MRPC and RTE is shorter, and never reaches the rate"),
    "learning_rate": choice(5e-4, "of the paper's grid 5e-5, 5e-4, 5e-3"),
}
OF_SCRIPTS = {
    "the scripts' length": "training.max_steps=512",
    "the scripts' rate": "training.learning_rate=8e-4",
}
ATTENTION = {**LORA, "target_modules": Because("self-attention", "36 modules")}
FEW = {f"K = {k}": f"method.keep={k}" for k in (1, 5)}

TABLE_1 = Table(
    "weightlora/table1",
    f"{PAPER}, Table 1",
    DEBERTA,
    {task: {} for task in GLUE},
    (
        Row(
            "full",
            "full fine-tuning",
            {"name": "full"},
            training={"learning_rate": choice(5e-5, "of the paper's grid, the one usual for it")},
            has_adapters=False,
        ),
        Row("lora", "LoRA", {"name": "lora"}),
        Row(
            "adalora",
            "AdaLoRA",
            {"name": "adalora", "target_r": choice(8, "the others' rank"), "init_r": 12},
            notes=(
                "The printed 664K are rank 12 throughout: in the scripts it never prunes. This is AdaLoRA as its "
                "own paper has it, with the others' alpha and dropout.",
            ),
        ),
        Row(
            "alora",
            "ALoRA",
            {"name": "alora"},
            notes=(
                "The printed 664K contradict ALoRA's paper, which starts at the budget, here 442,368. The scripts have "
                "no ALoRA.",
            ),
        ),
        Row(
            "increlora",
            "IncreLoRA",
            {
                "name": "increlora",
                "target_r": choice(8, "the printed 589K fit no rank"),
                "compat": Because(True, "the paper ran public code, which divides alpha by the rank at the time"),
            },
            notes=("The scripts have no IncreLoRA.",),
        ),
        Row(
            "dynamic_lora",
            "Dynamic LoRA",
            {
                "name": "dynamic_lora",
                "target_r": choice(8, "the others' rank"),
                "init_r": choice(12, "of its own paper"),
            },
            notes=(
                "The printed 626K fit no rank that could be derived; 12 to 8 is its own paper's. The scripts have no "
                "Dynamic LoRA.",
            ),
        ),
        Row(
            "lora_drop",
            "LoRA-drop",
            {
                "name": "lora_drop",
                "keep": Because(6, "of each type, 18 of 36: the printed 221K"),
                "share": Because(False, "so the paper describes it; LoRA-drop's own paper shares"),
            },
            notes=("How it was configured is not stated, and the scripts have no LoRA-drop.",),
        ),
        Row(
            "melora",
            "MELoRA",
            {"name": "melora", "minis": choice(4)},
            lora={"r": Because(2, "of each mini LoRA: the printed 110K")},
            notes=("The scripts have no MELoRA.",),
        ),
        Row(
            "flexora",
            "FlexLoRA",
            {"name": "flexora"},
            notes=(
                "The row is called FlexLoRA and cites Flexora (Wei et al. 2024), which is this; the text describes the "
                "federated FlexLoRA (weightlora.federated). The printed 442K are all 36 adapters, so they fit both.",
            ),
        ),
        Row(
            "weightlora",
            "WeightLoRA, K = 10",
            {"name": "weightlora", "keep": 10, "after": CUT, **GATES},
            others=FEW,
        ),
    ),
    SEED,
    SEEDS,
    grid={"training.learning_rate": NARROW},
    others=OF_SCRIPTS,
    lora=ATTENTION,
    training=ONE_EPOCH,
    notes=(HEAD,),
)

TABLE_6 = Table(
    "weightlora/table6",
    f"{PAPER}, Table 6",
    DEBERTA,
    {task: {} for task in GLUE},
    (
        Row(
            "rlora",
            "RLoRA, K = 10",
            {"name": "rlora", "keep": 10, "after": CUT},
            others=FEW,
            notes=(
                "WeightLoRA in all but the choice, which is drawn after T steps of training all. The rows with "
                "learnt weights are Table 1's, whose rank, modules and settings these have. The scripts can draw "
                "frozen modules, so that fewer than K act; here K do.",
            ),
        ),
    ),
    SEED,
    SEEDS,
    grid={"training.learning_rate": NARROW},
    others=OF_SCRIPTS,
    also=(TABLE_1.rows[-1],),
    reference="weightlora-10",
    lora=ATTENTION,
    training=ONE_EPOCH,
    notes=(HEAD,),
)

# -- more adapters, four ranks ---------------------------------------------------------------------------------------

# {task: (epochs, batch)} of Table 7
TABLE_7 = {
    "glue/cola": (15, 64),
    "glue/sst2": (10, 32),
    "glue/mrpc": (30, 64),
    "glue/qqp": (5, 32),
    "glue/mnli": (7, 32),
    "glue/qnli": (5, 32),
    "glue/rte": (50, 64),
}

TABLE_2 = Table(
    "weightlora/table2",
    f"{PAPER}, Table 2",
    DEBERTA,
    {
        task: {"training": {"num_train_epochs": epochs, "per_device_train_batch_size": batch}}
        for task, (epochs, batch) in TABLE_7.items()
    },
    (
        lora(training={"learning_rate": by_task(8e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 5e-4), "warmup_steps": warm(100)}),
        weightlora(
            20,
            training={"learning_rate": by_task(5e-4, 1e-3, 5e-4, 1e-3, 1e-3, 1e-3, 8e-4), "warmup_steps": warm(0)},
        ),
        weightlora_plus(
            20,
            training={"learning_rate": by_task(5e-4, 3e-4, 1e-4, 3e-4, 3e-4, 3e-4, 3e-4), "warmup_steps": warm(50)},
        ),
    ),
    SEED,
    SEEDS,
    grid={"training.learning_rate": WIDEST, "training.warmup_steps": WARM_UP},
    others={
        "the scripts' batch": "training.per_device_train_batch_size=32",
        "the scripts' length": "training.max_steps=512",
    },
    lora={**LORA, "target_modules": LINEAR},
    training={**TRAINING, **ACCUMULATED},
    notes=(HEAD,),
)

# {task: (steps, batch)} of Table 8
TABLE_8 = {
    "glue/cola": (1024, 16),
    "glue/sst2": (128, 32),
    "glue/mrpc": (512, 32),
    "glue/qqp": (1024, 8),
    "glue/mnli": (256, 16),
    "glue/qnli": (256, 16),
    "glue/rte": (256, 16),
    "glue/stsb": (256, 16),
}

TABLE_3 = Table(
    "weightlora/table3",
    f"{PAPER}, Table 3",
    LLAMA,
    {
        task: {"training": {"max_steps": steps, "per_device_train_batch_size": batch}}
        for task, (steps, batch) in TABLE_8.items()
    },
    (lora(), weightlora(100), weightlora_plus(20)),
    SEED,
    SEEDS,
    grid={"training.learning_rate": WIDEST, "training.warmup_steps": (10, 25, 30, 50)},
    lora={
        **LORA,
        "target_modules": Because("block-linear", "224 modules; the printed shares are twice theirs"),
    },
    training={
        **TRAINING,
        "gradient_accumulation_steps": 2,
        "learning_rate": choice(5e-4, "of the paper's grid"),
        "warmup_steps": choice(25, "of the paper's grid 10, 25, 30, 50"),
    },
    notes=("The authors' code refuses Llama.", HEAD),
)

SQUAD = ("squad", "squad_v2")

TABLE_4 = Table(
    "weightlora/table4",
    f"{PAPER}, Table 4",
    DEBERTA,
    {"squad": {"training": {"num_train_epochs": 10}}, "squad_v2": {"training": {"num_train_epochs": 15}}},
    (
        lora(training={"learning_rate": by_task(1e-3, 1e-3, tasks=SQUAD), "warmup_steps": warm(0)}),
        weightlora(20, training={"learning_rate": by_task(1e-4, 8e-4, tasks=SQUAD), "warmup_steps": warm(0)}),
        weightlora_plus(
            10,
            training={"learning_rate": by_task(3e-4, 5e-4, tasks=SQUAD), "warmup_steps": warm(50)},
            notes=("The table's 'WLoRA k=15' is this: a quarter of 60. Of the 72 here 18 stay.",),
        ),
    ),
    SEED,
    SEEDS,
    grid={"training.learning_rate": WIDE, "training.warmup_steps": WARM_UP},
    others={"the scripts' batch": "training.gradient_accumulation_steps=6"},
    data={"max_length": scripts(128, "the default of the scripts; 384 is usual"), "doc_stride": scripts(32)},
    lora={**LORA, "target_modules": LINEAR},
    training={**TRAINING, "per_device_train_batch_size": 32},
    notes=("The scripts give LoRA 3 epochs and WeightLoRA 10 on both; the paper 10 and 15.", HEAD),
)

SUMMARIES = ("xsum", "cnn_dailymail")
SEARCHED = "of the paper's grid, of which the scripts search {} for XSum"

TABLE_5 = Table(
    "weightlora/table5",
    f"{PAPER}, Table 5",
    "facebook/bart-large",
    {"xsum": {"training": {"num_train_epochs": 35}}, "cnn_dailymail": {"training": {"num_train_epochs": 25}}},
    (
        lora(training={"learning_rate": by_task(1e-3, 1e-3, tasks=SUMMARIES), "warmup_steps": warm(100)}),
        weightlora(
            20,
            training={
                "learning_rate": scripts(8e-5, SEARCHED.format("5e-5, 8e-5 and 1e-4")),
                "warmup_steps": warm(0),
            },
        ),
        weightlora_plus(
            20,
            training={
                "learning_rate": scripts(5e-5, SEARCHED.format("3e-5, 5e-5 and 8e-5")),
                "warmup_steps": warm(50),
            },
            notes=("The table's 'WLoRA k=48' is this: a quarter of 192.",),
        ),
    ),
    SEED,
    SEEDS,
    grid={"training.learning_rate": WIDE, "training.warmup_steps": WARM_UP},
    others={
        "the scripts' length": "training.num_train_epochs=15",
        "the scripts' batch": "training.gradient_accumulation_steps=24",
        "all rows": "data.eval_limit=null data.limit=null",
    },
    data={
        "max_length": scripts(256, "with 160, as in the scripts of WeightLoRA; those of LoRA take 128 and 64"),
        "max_target_length": scripts(160),
        "limit": scripts(5000, "as in the scripts of WeightLoRA, 7,000 in those of LoRA; the paper names no limit"),
        "eval_limit": scripts(1000),
    },
    lora={**LORA, "target_modules": Because("block-linear", "192 modules")},
    training={
        **TRAINING,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": choice(32, "which changes no result"),
    },
    generation={"num_beams": scripts(8), "max_new_tokens": scripts(256)},
)

_ALIGNED = "configs/weightlora/table1/rte_weightlora.yaml"
_LLAMA = "configs/weightlora/table3/rte_weightlora.yaml"
# {what the paper prints: the command that makes it here, or why there is none}
SHOWN = {
    **{f"Table {i}": f"`weightlora bench suites/weightlora/table{i}.yaml`" for i in range(1, 7)},
    "Tables 7 to 9 and appendix B": "the settings in those files",
    "Figure 1": "a drawing",
    "Figure 2": f"`weightlora figure alignment {_ALIGNED} OUT --one-by-one`",
    "Figure 3": f'`weightlora figure memory {_ALIGNED} OUT --memory "16 GB" --device cuda`',
    "Figure 3, for Llama 3 8B": f'`weightlora figure memory {_LLAMA} OUT --memory "24 GB" --device cuda`',
}
TABLES = (TABLE_1, TABLE_2, TABLE_3, TABLE_4, TABLE_5, TABLE_6)
