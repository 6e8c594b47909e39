"""FlexLoRA (Bai et al. 2024, arXiv 2402.11505): federated fine-tuning with a LoRA rank of its own on every client.

Not to be confused with Flexora, which chooses layers (`weightlora.Flexora`).

    aggregate.py   the server's step, a pure function
    client.py      what a client sends and gets, and how it trains
    rounds.py      rounds in one process
    flower.py      the same on Flower (`pip install 'weightlora[federated]'`); imported only by its users
"""

from weightlora.federated.aggregate import Factors, LowRank, aggregate, weighted_mean
from weightlora.federated.client import LocalTraining, Update, load, read
from weightlora.federated.rounds import Global, Round, Rounds, run_rounds, server_step

__all__ = [
    "Factors",
    "Global",
    "LocalTraining",
    "LowRank",
    "Round",
    "Rounds",
    "Update",
    "aggregate",
    "load",
    "read",
    "run_rounds",
    "server_step",
    "weighted_mean",
]
