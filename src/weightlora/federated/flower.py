"""FlexLoRA on Flower (flwr): a strategy for the ServerApp and a ClientApp, around the same server step and client.

Server:

    strategy = FlexLoRA(alpha=16, fraction_train=0.5)
    result = strategy.start(grid, initial_arrays(model_fn(8)), num_rounds=10)
    load_arrays(model := model_fn(8), result.arrays)

Client:

    app = client_app(lambda context: Client(model_fn(4), rows, name=context.node_config["partition-id"]))

The server learns a node's rank from its replies; until then it sends the whole average and the node takes its own
part, with the same result. Arrays travel in Flower's numpy serialisation, written and read with `allow_pickle=False`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from weightlora.errors import ConfigError
from weightlora.federated import client as exchange
from weightlora.federated.aggregate import LowRank
from weightlora.federated.client import LocalTraining, Update
from weightlora.federated.rounds import Global, client_seed, server_step

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"weightlora.federated.flower needs the package {missing.name!r}: pip install 'weightlora[federated]'",
        name=missing.name,
    ) from None

logger = logging.getLogger(__name__)

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
ROWS = "num-examples"  # the key of Flower's own strategies


class FlexLoRA(FedAvg):
    """Flower's FedAvg with the server step of FlexLoRA. Sampling, metrics and evaluation are FedAvg's.

    Args:
        alpha: `lora_alpha` of all clients; a client with another one refuses to train.
        max_rank: the highest rank of any client, if known: the server then keeps no more than it needs.
        compat: aggregate as the authors' code does.
        seed: for the clients' order of rows and their dropout.
        fraction_evaluate: share of the nodes that score the average after a round with `Client.evaluate`; default none.
        sampling: other arguments of `FedAvg`: `fraction_train`, `min_train_nodes`, `min_available_nodes`, ...
    """

    def __init__(
        self,
        alpha: float,
        *,
        max_rank: int | None = None,
        compat: bool = False,
        seed: int = 0,
        fraction_evaluate: float = 0.0,
        **sampling: Any,
    ) -> None:
        for key, fixed in (("weighted_by_key", ROWS), ("arrayrecord_key", ARRAYS), ("configrecord_key", CONFIG)):
            if sampling.get(key, fixed) != fixed:
                raise ConfigError(f"`{key}={sampling[key]!r}` cannot be changed here; it is {fixed!r}.")
        super().__init__(fraction_evaluate=fraction_evaluate, **sampling)
        self.alpha, self.max_rank, self.compat, self.seed = alpha, max_rank, compat, seed
        self._ranks: dict[int, dict[str, int]] = {}  # {node: {module: rank}}, for nodes that have replied

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._addressed(super().configure_train(server_round, arrays, config, grid), arrays)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self._addressed(super().configure_evaluate(server_round, arrays, config, grid), arrays)

    def _addressed(self, messages: Iterable[Message], arrays: ArrayRecord) -> list[Message]:
        """The same messages, each with the factors for its node's rank."""
        state = _state(arrays, self.alpha)
        whole = {name: low.r for name, low in state.average.items()}
        messages = list(messages)
        for message in messages:
            sent = state.at_rank(self._ranks.get(message.metadata.dst_node_id, whole))
            config: Any = message.content[CONFIG]
            config = ConfigRecord({**config, "alpha": float(self.alpha), "seed": self.seed})
            message.content = RecordDict({ARRAYS: _update_record(sent), CONFIG: config})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The server step over the replies that arrived, in the order of the nodes' ids.

        Raises:
            ConfigError, DivergedError: as `weightlora.federated.aggregate`.
        """
        trained: list[Message] = []
        for reply in replies:
            if reply.has_error():
                logger.warning("round %d: node %d failed: %s", server_round, reply.metadata.src_node_id, reply.error)
            else:
                trained.append(reply)
        if not trained:
            return None, None
        trained.sort(key=lambda reply: reply.metadata.src_node_id)
        contents = [reply.content for reply in trained]
        updates = [_update(content[ARRAYS]) for content in contents]
        rows: list[Any] = [content[METRICS][ROWS] for content in contents]  # pyright: ignore[reportIndexIssue]
        state = server_step(updates, rows, self.alpha, max_rank=self.max_rank, compat=self.compat)
        for reply, update in zip(trained, updates, strict=True):
            self._ranks[reply.metadata.src_node_id] = {name: len(A) for name, (A, _) in update.factors.items()}
        return _state_record(state), self.train_metrics_aggr_fn(contents, ROWS)


@dataclass(frozen=True, eq=False)
class Client:
    """A node's model, data and training.

    Attributes:
        model: LoRA of the client's rank on the base weights that all clients share.
        rows: its data. train: its local training.
        name: identifies the node in the seed of its training, for example the number of its partition.
        evaluate: scores the model with the server's average, where the strategy asks for it.
    """

    model: PeftModel
    rows: Sequence[Any]
    train: Callable[[PeftModel, Sequence[Any], int, int], float] = LocalTraining()  # noqa: RUF009
    name: object = 0
    evaluate: Callable[[PeftModel], Mapping[str, float]] | None = None


def client_app(client_fn: Callable[[Context], Client]) -> ClientApp:
    """A ClientApp that trains and scores what `client_fn` makes for a node's context.

    Args:
        client_fn: called for every message, as Flower keeps no object alive between them.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = client_fn(context)
        number, seed = _receive(client, message)
        loss = client.train(client.model, client.rows, number, client_seed(seed, client.name, number))
        sent = _update_record(exchange.read(client.model))
        metrics = MetricRecord({ROWS: len(client.rows), "train-loss": loss})
        return Message(RecordDict({ARRAYS: sent, METRICS: metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        client = client_fn(context)
        if client.evaluate is None:
            raise ConfigError("the strategy asks clients to score the average; give `Client` an `evaluate`.")
        _receive(client, message)
        scores = dict(client.evaluate(client.model.eval()))
        return Message(RecordDict({METRICS: MetricRecord({ROWS: len(client.rows), **scores})}), reply_to=message)

    return app


def initial_arrays(model: PeftModel) -> ArrayRecord:
    """The server's start: the parameters trained besides LoRA. In the first round every client has fresh LoRA."""
    return _update_record(Update({}, exchange.read(model).others))


def load_arrays(model: PeftModel, arrays: ArrayRecord) -> None:
    """Put the server's average, such as `result.arrays`, into a model, at the model's own rank."""
    exchange.load(model, _at_full_rank(_state(arrays, exchange.alpha_of(model))))


def _receive(client: Client, message: Message) -> tuple[int, int]:
    config: Any = message.content[CONFIG]
    if (alpha := exchange.alpha_of(client.model)) != config["alpha"]:
        raise ConfigError(f"the server averages with `alpha={config['alpha']}`, this client has `lora_alpha={alpha}`.")
    exchange.load(client.model, _update(message.content[ARRAYS]))
    return config["server-round"], config["seed"]


def _at_full_rank(state: Global) -> Update:
    return state.at_rank({name: low.r for name, low in state.average.items()})


# -- arrays by name: "A/module", "B/module" on the wire, "U/", "S/", "Vt/module" at the server, "other/parameter" ----


def _update_record(update: Update) -> ArrayRecord:
    tensors = {f"{part}/{name}": t for name, pair in update.factors.items() for part, t in zip("AB", pair, strict=True)}
    return _record(tensors, update.others)


def _state_record(state: Global) -> ArrayRecord:
    parts = {f"{part}/{name}": getattr(low, part) for name, low in state.average.items() for part in ("U", "S", "Vt")}
    return _record(parts, state.others)


def _record(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> ArrayRecord:
    named = {**tensors, **{f"other/{name}": value for name, value in others.items()}}
    # numpy has no bfloat16
    return ArrayRecord({n: Array(t.float() if t.dtype == torch.bfloat16 else t) for n, t in named.items()})


def _update(record: Any) -> Update:
    parts = _by_part(record)
    a, b = parts.get("A", {}), parts.get("B", {})
    if a.keys() != b.keys():
        raise ConfigError(f"A and B of different modules: {sorted(a.keys() ^ b.keys())[:3]}.")
    return Update({name: (a[name], b[name]) for name in a}, parts.get("other", {}))


def _state(record: Any, alpha: float) -> Global:
    parts = _by_part(record)
    average = {name: LowRank(parts["U"][name], S, parts["Vt"][name]) for name, S in parts.get("S", {}).items()}
    return Global(average, parts.get("other", {}), alpha)


def _by_part(record: Any) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, array in record.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = torch.from_numpy(array.numpy())
    return parts
