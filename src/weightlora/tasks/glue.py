"""GLUE (Wang et al. 2019): nine benchmarks with the columns, the class order and the splits of `nyu-mll/glue`.

The labels of most test splits are secret, so scores are on the validation split, as in the papers; for MNLI that
is the matched one, and the mismatched one serves as the test split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightlora.errors import ConfigError, did_you_mean
from weightlora.tasks.base import Benchmark, register
from weightlora.tasks.classification import Classification, Regression, Scorer, correlations

# The metric that the papers report for each benchmark, for `average`.
# WeightLoRA (Veprikov et al. 2025, Table 1): "ALL" is over seven tasks, GLUE without STS-B and WNLI, with
# the mean of the two metrics of MRPC and QQP.
WEIGHTLORA: Mapping[str, str] = {
    "glue/cola": "matthews",
    "glue/sst2": "accuracy",
    "glue/mrpc": "combined_score",
    "glue/qqp": "combined_score",
    "glue/mnli": "accuracy",
    "glue/qnli": "accuracy",
    "glue/rte": "accuracy",
}
# Its Table 3 adds STS-B, whose column says "Corr" and not which.
WEIGHTLORA_TABLE_3: Mapping[str, str] = {**WEIGHTLORA, "glue/stsb": "pearson"}
# LoRA-drop (Zhou et al. 2025): eight tasks, GLUE without WNLI. MNLI's accuracy is over the matched and the mismatched
# rows together: `data.validation.split: validation_matched+validation_mismatched`.
LORA_DROP: Mapping[str, str] = {
    **WEIGHTLORA,
    "glue/mrpc": "accuracy",
    "glue/stsb": "spearman",
    "glue/qqp": "accuracy",
}


def average(scores: Mapping[str, Mapping[str, float]], reported: Mapping[str, str] = WEIGHTLORA) -> float:
    """The mean over benchmarks of the metric reported for each.

    Args:
        scores: {task: its metrics}, such as `after` of each run's metrics.json; the mean is over these tasks, so
            compare only means over the same ones.
        reported: {task: metric}: `WEIGHTLORA`, `WEIGHTLORA_TABLE_3`, `LORA_DROP`, or your own.

    Raises:
        ConfigError: no scores, a task that is not in `reported`, or scores that lack its metric.
    """
    if not scores:
        raise ConfigError("There are no scores to average; give those of at least one task.")
    return sum(_reported(task, metrics, reported) for task, metrics in scores.items()) / len(scores)


def _reported(task: str, metrics: Mapping[str, float], reported: Mapping[str, str]) -> float:
    if task not in reported:
        raise ConfigError(
            f"The average has no place for task {task!r}{did_you_mean(task, list(reported))} "
            f"(it is over: {', '.join(reported)})."
        )
    metric = reported[task]
    if metric not in metrics:
        raise ConfigError(
            f"The scores of {task!r} lack {metric!r}{did_you_mean(metric, list(metrics))} "
            f"(there are: {', '.join(metrics)})."
        )
    return float(metrics[metric])


def _accuracy(targets: Any, chosen: Any) -> dict[str, float]:
    from sklearn.metrics import accuracy_score

    return {"accuracy": float(accuracy_score(targets, chosen))}


def _matthews(targets: Any, chosen: Any) -> dict[str, float]:
    """Matthews correlation, 0 where one class is always chosen."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews": float(matthews_corrcoef(targets, chosen)), **_accuracy(targets, chosen)}


def _accuracy_and_f1(targets: Any, chosen: Any) -> dict[str, float]:
    """Accuracy, F1 of class 1 (0 where it is neither present nor chosen), and their mean."""
    from sklearn.metrics import f1_score

    f1: Any = f1_score(targets, chosen, zero_division=0)  # pyright: ignore[reportArgumentType]
    return _with_mean({**_accuracy(targets, chosen), "f1": float(f1)})


def _both_correlations(targets: Any, values: Any) -> dict[str, float]:
    return _with_mean(correlations(targets, values))


def _with_mean(metrics: dict[str, float]) -> dict[str, float]:
    return {**metrics, "combined_score": sum(metrics.values()) / len(metrics)}


def _benchmark(config: str) -> Benchmark:
    if config == "mnli":
        return Benchmark("nyu-mll/glue", config, validation="validation_matched", test="validation_mismatched")
    return Benchmark("nyu-mll/glue", config)


def _classes(config: str, title: str, inputs: str, classes: str, scorer: Scorer, primary: str) -> None:
    register(
        Classification(
            f"glue/{config}",
            title,
            _columns(inputs),
            _benchmark(config),
            primary=primary,
            scorer=scorer,
            classes=tuple(classes.split()),
        )
    )


def _columns(inputs: str) -> dict[str, str | None]:
    return {**dict(zip(("text", "text_pair"), inputs.split(), strict=False)), "label": "label"}


_PAIR, _JUDGED = "sentence1 sentence2", "entailment not_entailment"

_classes("cola", "Whether a sentence is grammatical.", "sentence", "unacceptable acceptable", _matthews, "matthews")
_classes("sst2", "Whether a film review is favourable.", "sentence", "negative positive", _accuracy, "accuracy")
_classes(
    "mrpc",
    "Whether two sentences mean the same.",
    _PAIR,
    "not_equivalent equivalent",
    _accuracy_and_f1,
    "combined_score",
)
register(
    Regression(
        "glue/stsb",
        "How similar two sentences are, from 0 to 5.",
        _columns(_PAIR),
        _benchmark("stsb"),
        primary="pearson",
        scorer=_both_correlations,
        bounds=(0.0, 5.0),
    )
)
_classes(
    "qqp",
    "Whether two questions ask the same.",
    "question1 question2",
    "not_duplicate duplicate",
    _accuracy_and_f1,
    "combined_score",
)
_classes(
    "mnli",
    "Whether a hypothesis follows from a premise.",
    "premise hypothesis",
    "entailment neutral contradiction",
    _accuracy,
    "accuracy",
)
_classes("qnli", "Whether a sentence answers a question.", "question sentence", _JUDGED, _accuracy, "accuracy")
_classes("rte", "Whether the second sentence follows from the first.", _PAIR, _JUDGED, _accuracy, "accuracy")
_classes("wnli", "Whether a pronoun was read right.", _PAIR, "not_entailment entailment", _accuracy, "accuracy")
