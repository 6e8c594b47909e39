"""Writing the attached adapters into the `LoraConfig`, so that stock PEFT rebuilds just those, and reading them."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from peft import LoraConfig
from torch import nn

from weightlora.adapters import experts, ordinary
from weightlora.adapters.attach import ExpertAdapter, ends_of, list_adapters
from weightlora.adapters.host import base_of, find_host
from weightlora.adapters.surgery import alpha_for
from weightlora.errors import CheckpointError, UnsupportedError

# From this many names on PEFT replaces a list of target modules by suffixes it finds itself, which can match
# modules that were dropped; a regular expression is taken as it is.
LONGEST_LIST = 19
MOST_PATTERNS = 200  # well below the 512 regular expressions that Python keeps compiled

T = TypeVar("T")


def sync_config(model: nn.Module, adapter_name: str, *, as_list: bool = False) -> None:
    """Make `peft_config[adapter_name]` say which modules carry the adapter, at which rank and alpha.

    The commonest rank becomes `r`; the others go into `rank_pattern` and `alpha_pattern` under anchored full names.

    Args:
        as_list: the names as a list however many they are, for programs that read nothing else. PEFT attaches the same
            modules, but shortens a long list when it reads it, and so writes another one.
    """
    host = find_host(model)
    adapters = list_adapters(host, adapter_name, linear=False)
    forms = {a.target: (a.r, alpha_for(a)) for a in adapters}
    parameters = dict.fromkeys(a.target for a in adapters if hasattr(a.layer, "parameter_name"))
    targets = [name for name in forms if name not in parameters]
    config: Any = host.peft_config[adapter_name]
    names = {n for n, m in base_of(host).named_modules() if not _inside_adapter(n)}
    config.target_modules = targets if as_list else target_modules(targets, names)
    config.target_parameters = list(parameters) or None
    config.layers_to_transform = config.layers_pattern = None
    also = sorted(_ending_in(targets, names.difference(targets))) if as_list else []
    config.exclude_modules = exactly(also) if also else None
    (config.r, config.lora_alpha), _ = Counter(forms.values()).most_common(1)[0]
    config.rank_pattern = patterns({n: r for n, (r, _) in forms.items() if r != config.r})
    config.alpha_pattern = patterns({n: alpha for n, (_, alpha) in forms.items() if alpha != config.lora_alpha})


def fresh_config(model: nn.Module, adapter_name: str) -> LoraConfig:
    """What an adapter's config says of modules, ranks and alphas, for a LoRA that starts afresh on the base model.

    Raises:
        UnsupportedError: the adapter is no LoRA, or some experts of a parameter have one and others have none.
    """
    for adapter in list_adapters(model, adapter_name, linear=False):
        layer = adapter.layer
        if isinstance(adapter, ExpertAdapter) and len(experts.left(layer, adapter_name)) < ordinary.experts(layer):
            raise UnsupportedError(
                f"some experts of {adapter.target} were chosen and others were not, which no `LoraConfig` says; go on "
                "with the model that chose them, or choose with `experts='together'`."
            )
    config = find_host(model).peft_config[adapter_name]
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        raise UnsupportedError(f"the adapter is a {config.peft_type}, which no `LoraConfig` describes.")
    chosen = copy.deepcopy(config)
    chosen.inference_mode = False
    return chosen


def target_modules(names: Sequence[str], others: Iterable[str]) -> list[str] | str:
    """The `target_modules` that match `names` and nothing else among `others`: a list where that is safe."""
    if len(names) <= LONGEST_LIST and not any(_ending_in(names, others)):
        return list(names)
    return exactly(names)


def exactly(names: Iterable[str]) -> str:
    """The regular expression that matches these names and no others."""
    return "|".join(re.escape(name) for name in names)


def _ending_in(names: Iterable[str], others: Iterable[str]) -> Iterator[str]:
    """Those of `others` that a list of `names` means too: they are longer and end in one."""
    wanted = set(names)
    return (other for other in others if any(end in wanted and end != other for end in ends_of(other)))


def patterns(values: Mapping[str, T]) -> dict[str, T]:
    """Values by module in the form of `rank_pattern` and `alpha_pattern`.

    PEFT tries every key at every module. Of very many it would compile each anew each time, so that loading a few
    thousand takes hours; then all modules of one value have one key.
    """
    if len(values) <= MOST_PATTERNS:
        return {anchored(name): value for name, value in values.items()}
    groups: dict[T, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return {f"^(?:{exactly(names)})": value for value, names in groups.items()}


def anchored(name: str) -> str:
    """A pattern key for exactly this module: PEFT reads keys as regular expressions and matches them as suffixes."""
    return f"^{re.escape(name)}"


def _inside_adapter(name: str) -> bool:
    return ".base_layer" in name or ".lora_" in name


# Suffixes PEFT adds to a module's name for the weights of an adapter on it.
_PARTS = re.compile(r"^base_model\.model\.(.+?)\.(?:lora_|vera_lambda_|vblora_logits_)")


_FACTOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_(?:A\.weight|embedding_A)$")


def saved_modules(folder: Path) -> set[str]:
    """Names of the modules that a saved adapter of any type has weights for.

    Raises:
        CheckpointError: no adapter there, or its file cannot be read.
    """
    return {wrapped_at(found.group(1)) for key in _shapes(folder) if (found := _PARTS.match(key))}


def wrapped_at(path: str) -> str:
    """The module that LoRA layers are around at a path; `out_proj` of an attention module counts as the whole."""
    return path.removesuffix(".base_layer.out_proj").replace(".base_layer", "")


def saved_ranks(folder: Path) -> dict[str, int]:
    """{module name: rows of A} of a saved LoRA adapter: its rank, for experts' parameters times their number.

    Raises:
        CheckpointError: no adapter there, or its file cannot be read.
    """
    return {found.group(1): shape[0] for key, shape in _shapes(folder).items() if (found := _FACTOR.match(key))}


def _shapes(folder: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no adapter_model.safetensors; give the folder of a saved adapter.")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({error}); restore it or save again."
        ) from None
