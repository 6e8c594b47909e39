"""What a name tells: the block that a module lies in, and whether a metric falls as a model improves."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"^(?:(.*?)\.)?(\d+)\.(.+)$")
_LOWER_IS_BETTER = {"mse", "perplexity"}  # those not named as a loss


def block_of(module: str) -> tuple[str, int | None, str]:
    """The list of blocks that a module lies in, the number in it, and the rest of the name.

    ("encoder.block", 2, "layer.0.SelfAttention.q") of T5's `encoder.block.2.layer.0.SelfAttention.q`. Of lists within
    lists it is the outermost, in Swin a stage. A module outside of all lists has no number, and the list "".
    """
    match = _BLOCK.match(module)
    if match is None or len(match[2]) > 9:
        return "", None, module
    return match[1] or "", int(match[2]), match[3]


def lower_is_better(metric: str) -> bool:
    """Whether a metric, by its name, is a loss or an error."""
    name = metric.removeprefix("eval_")
    return name in _LOWER_IS_BETTER or name.endswith("loss")
