"""The base model with a fresh head, its tokenizer, and the modules that `lora` names: checked, or one clear message."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import TaskType
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from weightlora.errors import ConfigError, did_you_mean, short
from weightlora.methods.stock import head_modules
from weightlora.tasks.files import FROM_HERE
from weightlora.training.chat_templates import read_chat_template
from weightlora.training.heads import HeadKind
from weightlora.training.presets import PRESETS, by_tail, linear_modules, tails
from weightlora.training.quantised import check_packages, prepared, quantised_options
from weightlora.training.recipe import ModelSpec

logger = logging.getLogger(__name__)

_DTYPES = ["float32", "bfloat16", "float16", "auto"]


def check_source(spec: ModelSpec) -> None:
    """Checks without loading anything whether a local folder can be a model; hub ids pass."""
    if spec.dtype not in _DTYPES:
        raise ConfigError(
            f"`model.dtype` is {spec.dtype!r}{did_you_mean(spec.dtype, _DTYPES)} (there are: {', '.join(_DTYPES)})."
        )
    check_packages(spec)
    if spec.chat_template is not None:
        read_chat_template(spec.chat_template)
    folder = Path(spec.name).expanduser()
    if folder.is_dir():
        return _check_gguf(folder, spec) if spec.gguf_file else _check_folder(folder, spec.name)
    if folder.exists():
        raise ConfigError(f"Model {spec.name!r} is a file; give the folder that holds config.json.")
    if spec.name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec.name):
        raise ConfigError(f"Model folder {spec.name!r} does not exist (looked for {folder.absolute()}); {FROM_HERE}.")


def _check_gguf(folder: Path, spec: ModelSpec) -> None:
    there = sorted(file.name for file in folder.glob("*.gguf"))
    if not (folder / str(spec.gguf_file)).is_file():
        raise ConfigError(
            f"`model.gguf_file` is {spec.gguf_file!r}, not a file in {spec.name!r}"
            f"{did_you_mean(str(spec.gguf_file), there)} (there are: {', '.join(there) or 'no .gguf files'})."
        )


def _check_folder(folder: Path, name: str) -> None:
    from safetensors import SafetensorError, safe_open

    if not (folder / "config.json").is_file():
        gguf = next((file.name for file in sorted(folder.glob("*.gguf"))), None)
        hint = f"for the GGUF file in it set `model.gguf_file: {gguf}`" if gguf else "give the folder of a saved model"
        raise ConfigError(f"Model folder {name!r} has no config.json; {hint}.")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{str(file)!r} is corrupt ({error}); copy or download it again.") from error


def load_tokenizer(spec: ModelSpec) -> Any:
    """The model's tokenizer; without a padding token of its own it pads with the end-of-text token."""
    tokenizer = _fetched(spec, "tokenizer", lambda name, options: AutoTokenizer.from_pretrained(name, **options))
    # For many model types transformers makes up a tokenizer that knows no words where there is none.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise ConfigError(
            f"Model {spec.name!r} comes without a tokenizer; put its files (tokenizer.json and tokenizer_config.json) "
            "beside the model's."
        )
    if spec.chat_template is not None:
        tokenizer.chat_template = read_chat_template(spec.chat_template)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"The tokenizer of {spec.name!r} has neither a padding nor an end-of-text token; "
                "add a `pad_token` to its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("The tokenizer has no padding token; padding with %r instead.", tokenizer.eos_token)
    return tokenizer


def load_model(spec: ModelSpec, head: HeadKind, names: list[str] | None) -> PreTrainedModel:
    """The base model with its head; for sequences it has an output for each of `names`, or one number if None."""
    config = load_config(spec)
    if head.task_type(config) == TaskType.SEQ_CLS:
        labels = names or ["value"]
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "single_label_classification" if names else "regression"
    if head.task_type(config) == TaskType.QUESTION_ANS:
        config.num_labels = 2  # start and end, regardless of what the model was saved for
    weights = quantised_options(spec, head.auto(config), config)
    model, loading = _fetched(
        spec,
        "weights",
        lambda name, options: head.auto(config).from_pretrained(
            name,
            config=config,
            dtype=spec.dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **{**options, **weights},
        ),
    )
    _check_loaded(model, loading, spec.name, head_modules(model) if head.is_new else [])
    return prepared(model) if spec.quantization else model


def load_config(spec: ModelSpec) -> Any:
    """The model's configuration, which is all that is read of it."""
    return _fetched(spec, "config", lambda name, options: AutoConfig.from_pretrained(name, **options))


def _fetched(spec: ModelSpec, what: str, load: Callable[[str, dict[str, Any]], Any]) -> Any:
    """Runs `load(name, options)`; any error of the loaders becomes one message that names the model."""
    name = str(Path(spec.name).expanduser()) if Path(spec.name).expanduser().is_dir() else spec.name
    options = {"revision": spec.revision or "main", "trust_remote_code": spec.trust_remote_code}
    if spec.gguf_file:
        options["gguf_file"] = spec.gguf_file
    try:
        return load(name, options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if Path(name).is_dir():
            raise ConfigError(f"The {what} of model {spec.name!r} cannot be loaded: {reason}") from error
        raise ConfigError(
            f"Model {spec.name!r} is neither a folder here nor could it be fetched from the hub; check the "
            f"name, `model.revision` and the network ({reason})"
        ) from error


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def _check_loaded(model: PreTrainedModel, loading: dict[str, Any], name: str, new_heads: list[str]) -> None:
    """Only a head that starts anew may have another shape in the file; anything else would train from noise."""
    heads = tuple(f"{head}." for head in new_heads)
    keys = [entry if isinstance(entry, str) else entry[0] for entry in loading["mismatched_keys"]]
    wrong = sorted(key for key in keys if not key.startswith(heads))
    if wrong:
        raise ConfigError(
            f"The weights of {name!r} do not fit its config.json (first {wrong[0]!r}); use a matching pair."
        )
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith(heads) and "pooler" not in key)
    body = [key for key in model.state_dict() if not key.startswith(heads)]
    if len(missing) > len(body) / 2:
        raise ConfigError(
            f"{name!r} has no weights for {len(missing)} of the {len(body)} tensors of {type(model).__name__}, which "
            "would train from noise; take another model for this task."
        )
    if missing:
        logger.warning("%r lacks %d weights; they start at random: %s", name, len(missing), _some(missing))
    if keys:
        logger.info("The head of %r has another shape and starts anew.", name)


def fit_tokenizer(model: PreTrainedModel, tokenizer: Any, max_length: int) -> None:
    """Tells the model its padding token, and pads where its head expects it.

    Decoders classify by the last token that is not padding. Those with absolute positions, such as GPT-2, also
    count leading padding, so padding on the left would make the logits depend on the other rows of a batch.

    Raises:
        ConfigError: the model cannot embed some inputs.
    """
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id
    if type(model).__name__.endswith("ForSequenceClassification"):
        tokenizer.padding_side = "right"
    rows = len(model.get_input_embeddings().weight)  # pyright: ignore[reportArgumentType]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens but the model embeds {rows}; use the model's own tokenizer."
        )
    limit = position_limit(model)
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"`data.max_length` is {max_length}, but the model has positions for {limit} tokens; lower it."
        )


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest input in tokens, None without a limit; RoBERTa and relatives count from after the padding index."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and limit is not None:
            limit -= 0 if module.padding_idx is None else module.padding_idx + 1
            break
    return limit if limit is None or limit > 0 else None


def check_lora(model: nn.Module, lora: Mapping[str, Any]) -> None:
    """Every target and every module to save that the `lora` section names must exist."""
    _check_targets(model, lora.get("target_modules"))
    _check_modules_to_save(model, lora.get("modules_to_save"))


def _check_targets(model: nn.Module, targets: Any) -> None:
    linear = linear_modules(model)
    if isinstance(targets, str) and targets.lower() != "all-linear":
        try:
            pattern = re.compile(targets)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"`lora.target_modules` is {short(targets)}, no regular expression: {error}.") from None
        if not any(pattern.fullmatch(name) for name, _ in model.named_modules()):
            raise ConfigError(
                f"`lora.target_modules` is {targets!r}, a pattern for full names that matches nothing"
                f"{did_you_mean(targets, [*PRESETS, 'all-linear'])}; for plain names write a list such as [{targets}] "
                f"(presets: {', '.join(PRESETS)}, all-linear; linear modules here: {tails(linear)})."
            )
    elif targets is not None and not isinstance(targets, str):
        for target in sorted(targets):
            if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
                raise ConfigError(
                    f"`lora.target_modules` names {target!r}, which matches no module"
                    f"{did_you_mean(target, list(by_tail(linear)))} (linear modules here: {tails(linear)})."
                )


def _check_modules_to_save(model: nn.Module, modules_to_save: Sequence[str] | None) -> None:
    names = {part for name, _ in model.named_modules() for part in (name, name.rsplit(".", 1)[-1])}
    for wanted in modules_to_save or []:
        if wanted not in names:
            known = sorted({name.split(".", 1)[0] for name in names if name})
            raise ConfigError(
                f"`lora.modules_to_save` names {wanted!r}, which matches no module"
                f"{did_you_mean(wanted, known)} (at the top there are: {', '.join(known)})."
            )
