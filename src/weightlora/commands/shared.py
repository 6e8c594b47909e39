"""What the commands share: arguments, how they end, what is logged."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

_MOST_SHOWN = 2000  # characters of a message

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Replace entries of the recipe.", show_default=False),
]
AsInTrain = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Replace entries, as in train.", show_default=False),
]


class TakesEntries(TyperCommand):
    """A command with entries of a recipe, which are no options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As any command, but where there is no such option it says how entries are written."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":  # of click, or of typer's own copy
                said = f"{error.format_message()}; recipe entries are written `key=value`, such as `method.keep=5`."  # type: ignore[attr-defined]
                error.message, error.possibilities = said, None  # type: ignore[attr-defined]
            raise


def fail(message: str, code: int = 2) -> None:
    """End with one message on stderr, from the first process only."""
    if len(message) > _MOST_SHOWN:  # a value of theirs may be of any length
        message = f"{message[: _MOST_SHOWN // 2]} ... {message[-_MOST_SHOWN // 2 :]}"
    if is_first():
        print(f"weightlora: {message}", file=sys.stderr)
    raise SystemExit(code)


def is_first() -> bool:
    """Whether this process speaks: the first, or the only one, of those that `torchrun` has started."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def interruptible(then: str) -> Iterator[None]:
    """Ctrl-C is one line and exit code 130, SIGTERM after a checkpoint 143."""
    from weightlora.training.stopping import Stopped

    try:
        yield
    except Stopped as stopped:
        fail(f"{stopped}; its checkpoint is whole, and {then}", 128 + stopped.signal)
    except KeyboardInterrupt:
        fail(f"stopped at once; {then}", 130)


def log_to_stderr(level: str = "INFO") -> None:
    """The library's own log lines from `level` on; what transformers says about a new head is expected and left out.

    To be called before PEFT is imported: that imports bitsandbytes, which warns of kernels it would like to have.
    """
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of one dependency about another
    logging.basicConfig(format="%(message)s")
    level = level if is_first() else "ERROR"
    logging.getLogger().handlers[0].setLevel(level)
    logging.getLogger("weightlora").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
