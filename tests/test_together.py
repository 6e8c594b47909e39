"""Exports of several runs in one running model, by stock PEFT and transformers alone: swapped, mixed, merged, added."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM

from weightlora import ConfigError, RLoRA, WeightLoRA, export, export_together, list_adapters


class Runs(NamedTuple):
    """Three runs on one base model that kept other modules, with other ranks and scalings.

    Attributes:
        logits: {run: what its model computes}.
        kept: {run: names of its modules}.
    """

    folder: Path
    logits: dict[str, Tensor]
    kept: dict[str, set[str]]

    def __call__(self, name: str) -> Path:
        return self.folder / name

    @property
    def folders(self) -> list[Path]:
        return [self(name) for name in self.logits]

    def base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / "base").eval()


BATCH = {key: value for key, value in tiny.build("llama").batch.items() if key != "labels"}

SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "topics": (WeightLoRA(keep=4, after=2), {"r": 3, "lora_alpha": 8, "lora_dropout": 0.1}),
    "moods": (RLoRA(keep=5, seed=1), {"r": 2, "use_rslora": True, "rank_pattern": {"up_proj": 5}}),
    "names": (RLoRA(keep=6, seed=2), {"r": 4, "alpha_pattern": {"q_proj": 3, "v_proj": 20}}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    tiny.build("llama", initializer_range=0.3).model.save_pretrained(folder / "base")
    found = Runs(folder, {}, {})
    for seed, (name, (method, lora)) in enumerate(SETTINGS.items()):
        torch.manual_seed(seed)
        model: Any = get_peft_model(found.base(), tiny.lora(tiny.build("llama"), init_lora_weights=False, **lora))
        method.attach(model)
        method.plan(total_steps=4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        method.bind(optimizer)
        for _ in range(3):
            model(**tiny.build("llama").batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / name)
        found.kept[name] = {a.name for a in list_adapters(model)}
        found.logits[name] = logits(model)
    assert not set.intersection(*found.kept.values()) == set.union(*found.kept.values())
    return found


@pytest.fixture(scope="module")
def together(runs: Runs) -> Path:
    return export_together(runs.folders, runs.folder / "together")


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    return model.eval()(**BATCH, **options).logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_each_is_what_it_was_on_the_modules_of_all(runs, together):
    union = set.union(*runs.kept.values())
    for name, expected in runs.logits.items():
        model = PeftModel.from_pretrained(runs.base(), str(together / name))
        close(logits(model), expected)
        assert {a.name for a in list_adapters(model)} == union
        assert {(a.r, a.scaling) for a in list_adapters(model)} == {(5, list_adapters(model)[0].scaling)}
        for adapter in list_adapters(model):
            assert adapter.A.weight.any()  # it can go on learning
            assert bool(adapter.B.weight.any()) == (adapter.name in runs.kept[name])


def test_they_take_each_others_place_in_every_order(runs, together):
    for first in runs.logits:
        model = PeftModel.from_pretrained(runs.base(), str(together / first))
        for other in [*runs.logits, first]:
            hotswap_adapter(model, str(together / other), adapter_name="default")
            close(logits(model), runs.logits[other])


def test_what_each_run_exports_alone_does_not_fit(runs, tmp_path):
    """This is why there is such an export."""
    for name in ("topics", "moods"):
        export(runs(name), tmp_path / name, portable=True)
    model = PeftModel.from_pretrained(runs.base(), str(tmp_path / "topics"))
    with pytest.raises((RuntimeError, ValueError), match=r"unexpected keys|Configs are incompatible"):
        hotswap_adapter(model, str(tmp_path / "moods"), adapter_name="default")


FORMS = ["stock", "together"]


@pytest.fixture(scope="module")
def exported(runs: Runs, together: Path) -> dict[str, Path]:
    for name in runs.logits:
        export(runs(name), runs.folder / "stock" / name)
    return {"stock": runs.folder / "stock", "together": together}


@pytest.mark.parametrize("form", FORMS)
def test_several_in_one_batch(form, runs, exported):
    model = PeftModel.from_pretrained(runs.base(), str(exported[form] / "topics"), adapter_name="topics")
    for name in ("moods", "names"):
        model.load_adapter(str(exported[form] / name), adapter_name=name)
    rows = ["topics", "__base__", "names", "moods"]
    found = logits(model, adapter_names=rows)
    plain = logits(runs.base())
    for row, name in enumerate(rows):
        close(found[row], (plain if name == "__base__" else runs.logits[name])[row])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_added_with_weights(form, kind, runs, exported):
    if (form, kind) == ("stock", "linear"):
        pytest.skip("PEFT adds factors of one rank only")
    model = PeftModel.from_pretrained(runs.base(), str(exported[form] / "topics"), adapter_name="topics")
    model.load_adapter(str(exported[form] / "moods"), adapter_name="moods")
    parts = {name: updates(model, name) for name in ("topics", "moods")}
    if kind == "cat":
        model.add_weighted_adapter(["topics", "moods"], [0.5, 2.0], "both", combination_type="cat")
        expected = {
            n: 0.5 * parts["topics"].get(n, 0) + 2.0 * parts["moods"].get(n, 0)
            for n in parts["topics"] | parts["moods"]
        }
        found = updates(model, "both")
        assert found.keys() == expected.keys()
        for name, update in expected.items():
            close(found[name], update)
    else:
        model.add_weighted_adapter(["topics", "moods"], [1.0, 0.0], "both", combination_type="linear")
        model.set_adapter("both")
        close(logits(model), runs.logits["topics"])


def updates(model: Any, key: str) -> dict[str, Tensor]:
    return {a.name: (a.scaling * a.B.weight @ a.A.weight).detach() for a in list_adapters(model, key)}


@pytest.mark.parametrize("form", FORMS)
def test_loaded_and_merged_by_transformers_and_peft(form, runs, exported):
    for name, expected in runs.logits.items():
        model = runs.base()
        model.load_adapter(str(exported[form] / name))
        close(logits(model), expected)
        merged = PeftModel.from_pretrained(runs.base(), str(exported[form] / name)).merge_and_unload()
        close(logits(merged), expected)
        assert not any("lora" in key for key in merged.state_dict())


def test_runs_that_are_called_the_same_are_numbered(runs, tmp_path):
    for parent, name in (("a", "topics"), ("b", "moods")):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "run").symlink_to(runs(name), target_is_directory=True)
    out = export_together([tmp_path / "a/run", runs("moods")], tmp_path / "out")
    assert sorted(folder.name for folder in out.iterdir()) == ["moods", "run"]
    out = export_together([tmp_path / "a/run", tmp_path / "b/run"], tmp_path / "again")
    assert sorted(folder.name for folder in out.iterdir()) == ["1-run", "2-run"]


def test_refusals_leave_nothing_behind(runs, tmp_path):
    with pytest.raises(ConfigError, match="give two or more"):
        export_together([runs("topics")], tmp_path / "out")
    other = tiny.build("llama", hidden_size=48)
    other.model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, tiny.lora(other)).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="on one base model only"):
        export_together([runs("topics"), tmp_path / "other"], tmp_path / "out")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("precious")
    with pytest.raises(ConfigError, match="in use"):
        export_together(runs.folders, tmp_path / "used")
    assert not (tmp_path / "out").exists() and (tmp_path / "used/file").read_text() == "precious"
