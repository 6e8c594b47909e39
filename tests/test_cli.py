"""The command, as a user meets it: help, lists, runs, exit codes and messages."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_text import recipe, save_tiny_bert
from tiny_writer import save_writer

from weightlora import cli

SOURCE = Path(cli.__file__).parents[1]


@pytest.fixture
def folder(folder: Path) -> Path:
    """With a recipe too."""
    write_recipe(folder)
    return folder


def write_recipe(folder: Path, **entries: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, **entries)), encoding="utf-8")
    return path


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    script = (
        "import sys, weightlora.cli as cli\n"
        "sys.argv = ['weightlora', '--help']\n"
        "try:\n    cli.main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'numpy', 'peft'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": str(SOURCE)}
        )
        seconds.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
        assert "weightlora train recipe.yaml" in done.stdout
    assert min(seconds) < 1.0  # the machine may be busy once


@pytest.mark.parametrize(
    "name", [["train"], ["probe"], ["select"], ["watch"], ["export"], ["list", "methods"], ["list", "tasks"]]
)
def test_every_command_has_help_with_an_example(command: Callable[..., Any], name: list[str]) -> None:
    code, out, _ = command(*name, "--help")
    assert code == 0 and "Example:" in out


def test_version(command: Callable[..., Any]) -> None:
    from weightlora import __version__

    assert command("--version") == (0, f"weightlora {__version__}\n", "")


def test_lists_name_every_method_and_task(command: Callable[..., Any]) -> None:
    from weightlora.methods import list_methods
    from weightlora.tasks import list_tasks

    code, out, _ = command("list", "methods")
    assert code == 0 and all(f"\n{info.name}\n" in f"\n{out}" for info in list_methods())
    code, out, _ = command("list", "tasks")
    assert code == 0 and all(f"\n{task.name}\n" in f"\n{out}" for task in list_tasks())


def test_a_dry_run_shows_the_plan_and_writes_nothing(command: Callable[..., Any], folder: Path) -> None:
    before = sorted(folder.iterdir())
    code, out, err = command("train", folder / "recipe.yaml", "--dry-run")
    assert (code, err) == (0, "")
    assert "bert.encoder.layer.1.attention.self.query" in out
    assert "48 train, 12 validation rows, 3 classes" in out
    assert "Trainable  3,939 of" in out
    assert "nothing was trained" in out
    assert [path for path in sorted(folder.iterdir()) if path.name != "cache"] == before


def test_train_shows_what_was_kept_and_the_score(command: Callable[..., Any], folder: Path) -> None:
    overrides = ["method={name: weightlora, keep: 2, after: 4}", "training.num_train_epochs=1"]
    code, out, err = command("train", folder / "recipe.yaml", *overrides)
    assert code == 0
    assert "step 0 of 6, scouting 13 adapters, cut after step 4" in err
    assert "step 4 of 6, kept 2 of 13 adapters" in err and "evaluated after step 6: " in err
    assert "it/s]" not in err and "'loss'" not in out  # no bar where nobody sees it, and no log lines of the Trainer's
    assert "Kept       2 of 13 adapters" in out
    assert "Score      accuracy 0." in out and " -> " in out
    assert "adapter/, metrics.json, recipe.yaml, events.jsonl" in out
    again, out, err = command("train", folder / "recipe.yaml", *overrides)
    assert again == 2 and "choose another `output_dir`, or pass --resume" in err


def test_export_copies_a_run_out(command: Callable[..., Any], folder: Path) -> None:
    assert command("train", folder / "recipe.yaml", "training.num_train_epochs=1")[0] == 0
    code, out, err = command("export", folder / "run", folder / "out")
    assert code == 0, err
    assert (folder / "out/adapter_model.safetensors").is_file()
    assert str(folder / "out") in out


def test_probe_shows_where_and_how_much(command: Callable[..., Any], folder: Path) -> None:
    code, out, err = command("probe", folder / "recipe.yaml", "--steps", "4", "--out", folder / "probe")
    assert code == 0, err
    for word in (
        "K-FAC gain of each adapter",
        "Enough     ",
        "To choose  ",
        "Advice     ",
        "report.html",
        "query",
        "█",
    ):
        assert word in out, word
    code, _, err = command("probe", folder / "recipe.yaml", "--steps", "4", "--out", folder / "probe")
    assert code == 2 and "Traceback" not in err


def test_select_shows_the_choice_and_where_it_is(command: Callable[..., Any], folder: Path) -> None:
    code, out, _ = command("select", folder / "recipe.yaml", "method={name: weightlora, keep: 2, after: 4}")
    assert code == 0 and "Chosen     2 modules, r 4" in out
    assert "adapter_config.json, axolotl.yaml, llama-factory.yaml, ms-swift.txt" in out
    assert (folder / "run/adapter_config.json").is_file()
    code, _, err = command("select", folder / "recipe.yaml", f"output_dir={folder / 'other'}")
    assert code == 2 and "'lora' chooses no modules or ranks" in err


def test_export_of_several_runs_and_what_it_cannot_do(command: Callable[..., Any], tmp_path: Path) -> None:
    import tiny
    import torch
    from peft import get_peft_model

    made = tiny.build("llama")
    made.model.save_pretrained(tmp_path / "base")
    for name, target in (("a", "q_proj"), ("b", "up_proj")):
        torch.manual_seed(0)
        model: Any = type(made.model).from_pretrained(tmp_path / "base")
        lora = tiny.lora(made, target_modules=[target], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(tmp_path / name)
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "out"
    assert command("export", a, b, out, "--same-shape")[0] == 0
    assert sorted(folder.name for folder in out.iterdir()) == ["a", "b"]
    assert command("export", a, tmp_path / "gguf", "--gguf")[0] == 0
    assert (tmp_path / "gguf/adapter.gguf").is_file()
    for arguments, says in (
        ([a], "takes a run and a folder to write to"),
        (["nosuch", tmp_path / "c"], "'nosuch' does not exist; give the folder of a run, its `output_dir`"),
        ([a / "adapter_config.json", tmp_path / "c"], "adapter_config.json' is a file; give the folder of a run"),
        ([tmp_path, tmp_path / "c"], "holds no adapter"),
        ([a, b, tmp_path / "c"], "was given 2 runs; add --same-shape"),
        ([a, b, tmp_path / "c", "--same-shape", "--merged"], "leave out --merged, --gguf and --dtype"),
        ([a, tmp_path / "c", "--portable", "--gguf"], "forms of their own"),
        ([tmp_path / "base", tmp_path / "c", "--gguf"], "export it without gguf"),
        ([a, tmp_path / "c", "--merged", "--dtype", "float8"], "there are: float32, float16, bfloat16"),
        ([a, tmp_path / "c", "--dtype", "float16"], "A dtype is for merged models; an adapter keeps its own"),
    ):
        code, out_, err = command("export", *arguments)
        assert (code, out_) == (2, "") and says in err and "Traceback" not in err
        assert not (tmp_path / "c").exists()


def test_many_adapters_are_grouped(command: Callable[..., Any], folder: Path) -> None:
    save_tiny_bert(folder / "model", layers=7)
    code, out, _ = command("train", folder / "recipe.yaml", "--dry-run")
    assert code == 0
    assert "bert.encoder.layer.*.attention.self.query" in out
    assert "lora on 43 adapters" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.yaml"], "'gone.yaml' is not a file"),
        (["recipe.yaml", "training.learning_rte=1"], "did you mean 'learning_rate'?"),
        (["recipe.yaml", "metod=lora"], "did you mean 'method'?"),
        (["recipe.yaml", "method=weightlra"], "did you mean 'weightlora'?"),
        (["recipe.yaml", "task=regresion"], "did you mean 'regression'?"),
        (["recipe.yaml", "data.columns.text=qestion"], "did you mean 'question'?"),
        (["recipe.yaml", "lora.target_modules=[querry]"], "did you mean 'query'?"),
        (["recipe.yaml", "method={name: weightlora, keep: 99}"], "99"),
        (["recipe.yaml", "method=nonesuch"], "Unknown method 'nonesuch' (there are: "),
        (["recipe.yaml", "method=weightlora+"], "did you mean 'weightlora_plus'? (there are: "),
        (["recipe.yaml", "method={name: lora, kep: 1}"], "Method 'lora' has no option 'kep' (it has: none)."),
        (["recipe.yaml", "keep=5"], "did you mean `method.keep`?"),
        (["recipe.yaml", "lora.rank=8"], "`lora.rank` is no field of LoraConfig; did you mean 'r'?\n"),
        (["recipe.yaml", "lora.lora_rank=8"], "did you mean 'r'?\n"),
        (["recipe.yaml", "lora.bananas=8"], "`lora.bananas` is no field of LoraConfig; leave it out.\n"),
        (["recipe.yaml", "training.lr=1"], "no field of TrainingArguments; did you mean 'learning_rate'?\n"),
        (["recipe.yaml", "training.batch_size=1"], "did you mean 'per_device_train_batch_size'?\n"),
        (["suite.yaml"], "'suite.yaml' looks like a suite; `weightlora bench` takes it."),
        (["recipe.yaml", "model=./gone"], "/gone); paths are relative to the folder you start from."),
        (["recipe.yaml", "data.train=gone.csv"], "/gone.csv); paths are relative to the folder you start from."),
        (["recipe.yaml", "data.columns={}"], "such as `data.columns: {text: question, label: topic}`."),
        (
            ["recipe.yaml", "metric=f2", "--dry-run"],
            "`metric` is 'f2'; choose one of: loss, accuracy, macro_f1, matthews.",
        ),
        (["recipe.yaml", "metric=acuracy", "--dry-run"], "did you mean 'accuracy'? Choose one of: loss, accuracy, "),
        (
            ["recipe.yaml", "training.metric_for_best_model=f2", "--dry-run"],
            "`training.metric_for_best_model` is 'f2'; choose one of: loss, accuracy, macro_f1, matthews.",
        ),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(
    command: Callable[..., Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(folder)
    (folder / "suite.yaml").write_text("base: {}\ntasks: [glue/cola]\nmethods: [lora]\n", encoding="utf-8")
    code, out, err = command("train", *arguments)
    assert (code, out) == (2, "")
    assert says in err and err.startswith("weightlora: ")
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not (folder / "run").exists()


def test_what_a_command_takes_is_said_as_it_is_typed(
    command: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for arguments, says in (
        (["bench", "recipe.yaml"], "'recipe.yaml' looks like a recipe; `weightlora train` takes it."),
        (["train", "recipe.yaml", "--keep", "5"], "; recipe entries are written `key=value`, such as `method.keep=5`."),
        (["figure", "memory", "recipe.yaml", "out", "--keep=5"], "such as `method.keep=5`."),
        (["schema", "model"], "'model' is a folder; give a file, such as 'model/recipe.schema.json'."),
        (["schema", "gone/schema.json"], "'gone' is no folder"),
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (2, "") and says in err and "Traceback" not in err, arguments
    _, shown, _ = command("train", "--help")
    assert "RECIPE} [KEY=VALUE]...\n" in shown and "[[" not in shown
    _, shown, _ = command("export", "--help")
    assert "which does not exist or is empty" in " ".join(shown.split())


def test_a_list_is_all_that_is_printed() -> None:
    """PEFT imports bitsandbytes, which speaks of kernels it would like to have."""
    for arguments in (["list", "tasks"], ["schema"]):
        done = subprocess.run(
            [sys.executable, "-m", "weightlora", *arguments],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"},
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_package_names_the_extra(
    command: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    code, _, err = command("train", folder / "recipe.yaml", "--dry-run")
    assert code == 2
    assert "pip install 'weightlora[train]'" in err


def test_a_decoder_that_writes_needs_trl(
    command: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_writer(folder / "writer", "llama")
    data = {"train": str(folder / "train.jsonl"), "columns": {"input": "question", "target": "topic"}}
    lengths = {"max_length": 16, "max_target_length": 4}
    write_recipe(folder, model=str(folder / "writer"), task="text-generation", data={**data, **lengths})
    monkeypatch.delitem(sys.modules, "weightlora.training.decoder", raising=False)
    monkeypatch.setitem(sys.modules, "trl.trainer.sft_config", None)
    code, _, err = command("train", folder / "recipe.yaml", "--dry-run")
    assert code == 2
    assert "This needs the package 'trl', which is not installed: pip install 'weightlora[llm]'" in err


def test_a_command_that_does_not_exist(command: Callable[..., Any]) -> None:
    code, _, err = command("trian", "x.yaml")
    assert code == 2 and "No such command" in err


def test_unreadable_data_is_one_line(command, folder: Path) -> None:
    (folder / "data.parquet").write_bytes(b"PAR1 and no more")
    path = write_recipe(folder, data=str(folder / "data.parquet"))
    code, _, error = command("train", path)
    assert code == 2 and error.startswith("weightlora: Data file ") and error.count("\n") == 1
    assert not (folder / "run").exists()


def test_a_run_that_was_asked_to_stop_says_how_to_go_on(command: Callable[..., Any], folder: Path) -> None:
    from transformers import Trainer

    def interrupt(number: int) -> Any:
        step = Trainer.training_step

        def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 3:
                signal.raise_signal(number)
            return step(self, *args, **kwargs)

        return stepping

    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Trainer, "training_step", interrupt(number))
            ended, _, err = command("train", folder / "recipe.yaml", f"output_dir={folder / str(code)}")
        assert ended == code
        assert (
            f"weightlora: stopped by {number.name} after step 4; its checkpoint is whole, and --resume goes on" in err
        )
        assert command("train", folder / "recipe.yaml", f"output_dir={folder / str(code)}", "--resume")[0] == 0


def test_only_the_first_process_speaks(
    command: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert command("train", folder / "recipe.yaml", "--dry-run") == (0, "", "")
    assert command("train", folder / "recipe.yaml", "metod=lora") == (2, "", "")


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from weightlora import terminal

    terminal._print_table(["[bold]a[/bold]", "b"], [["[red]x", "[/nothing]"], ["[link=y]z[/link]", ":smile:"]])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[bold]a[/bold]", "[red]x", "[/nothing]", "[link=y]z[/link]", ":smile:"))


# ---- estimate --------------------------------------------------------------------------------------------------


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A recipe whose model is a config.json and nothing else, and whose data does not exist."""
    save_tiny_bert(tmp_path / "whole")
    (tmp_path / "model").mkdir()
    shutil.copy(tmp_path / "whole/config.json", tmp_path / "model/config.json")
    raw = recipe(
        tmp_path, model=str(tmp_path / "model"), data={"train": "nowhere.jsonl", "max_length": 16}, method="weightlora"
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return tmp_path / "recipe.yaml"


def test_estimate_needs_config_json_alone_and_says_the_same_as_json(command: Callable[..., Any], config_only: Path):
    arguments = ("estimate", config_only, "method.keep=2", "--memory", "1 GB", "--peft")
    code, shown, error = command(*arguments)
    assert code == 0, error
    code, text, error = command(*arguments, "--json")
    found = json.loads(text)
    assert code == 0 and found["kept"] == {"all": found["kept"]["all"], "spread": 2, "least": 2, "most": 2}
    assert f"{found['trainable']['all']:,} of " in shown and "all 13 adapters fit" in shown
    for memory in found["memory"]:
        if memory["kept"] == "all":
            assert f"{memory['saved_bytes'] / 2**20:,.2f}" in shown and f"{memory['peak_bytes'] / 2**20:,.2f}" in shown
    for kind in found["modules"]:
        assert f"{kind['parameters']:,}" in shown
    assert not (config_only.parent / "runs").exists() and "scipy" not in [
        n for n, m in sys.modules.items() if m is None
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (["lora.target_modules=[qery]"], "'qery', which matches no module; did you mean 'query'?"),
        (["method=vera"], "'vera' is none of them"),
        (["--memory", "plenty"], "`--memory` is 'plenty', no amount of memory"),
        (["--memory", "10 adapters"], "no amount of memory"),
        (["--device", "tpu"], "give cpu or cuda"),
        (["model=nowhere/at/all"], "'nowhere/at/all' does not exist"),
    ],
)
def test_estimate_says_what_cannot_be_in_one_line(command: Callable[..., Any], config_only: Path, override, said):
    code, _, error = command("estimate", config_only, *override)
    assert code == 2 and said in error and len(error.splitlines()) == 1
