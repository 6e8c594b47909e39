"""EXPERIMENTS: a suite of runs, methods by tasks by seeds, that can be interrupted, and the table of its results."""

from weightlora.bench.runner import run_suite
from weightlora.bench.suite import Suite, load_suite
from weightlora.bench.table import summarise

__all__ = ["Suite", "load_suite", "run_suite", "summarise"]
