"""Feeds the command recipes, suites, data files and run folders that are wrong in thousands of ways.

    scripts/fuzz                      10,000 cases
    scripts/fuzz --cases 500 --seed 3 --only data

Each case must end within 5 seconds of work with exit code 0 or 2, without a traceback, and with nothing written,
renamed or removed outside its own folder and the `output_dir` it names. What it starts from is valid; then parts are
replaced, removed, doubled, nested or cut, in the text and in the values.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.progress import Progress
from tiny_text import questions, recipe

from benchmarks.faults import workplace
from weightlora import cli, durable, methods

LIMIT = 5  # seconds of this process at work, whatever else the machine does
WAITS = 120  # seconds on the clock, for a case that waits and does not work
WEIRD: list[Any] = [
    None,
    True,
    0,
    -1,
    1e400,
    float("nan"),
    10**30,
    0.5,
    "",
    " ",
    "\x00",
    "\n",
    "x" * 5000,
    "../../elsewhere",
    "/",
    "~nobody/x",
    "~",
    ".",
    "[bold]",
    "{}",
    "*",
    "no/such/thing",
    "\u202e\ud83d\ude00",
    [],
    {},
    [None],
    [[[]]],
    {"a": {"b": {"c": 1}}},
    {"name": None},
    {1: 2},
    ["query", 3],
    "None",
    "1e3",
    "50%",
    "-5%",
    "40% memory",
    "weightlora",
    "lora",
]
SNIPPETS = [
    "[",
    "]",
    "{",
    "}",
    ": ",
    "- ",
    "&a ",
    "*a",
    "!!int ",
    "!!map ",
    "? ",
    "<<: *a",
    "\t",
    "\x07",
    "'",
    '"',
    "|",
    ">",
]


# -- what is made ------------------------------------------------------------------------------------------------------


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in nested mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def disturbed(value: Any, draw: random.Random) -> Any:
    """A copy in which some places hold something else, or nothing."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        found = list(places(value))
        if not found:
            break
        *above, last = draw.choice(found)
        inside = value
        for key in above:
            inside = inside[key]
        how = draw.random()
        if how < 0.7:
            inside[last] = copy.deepcopy(draw.choice(WEIRD))
        elif how < 0.8:
            del inside[last]
        elif isinstance(inside, dict):
            inside[draw.choice([f"{last}x", "", 3, None, "name", "a.b"])] = inside.pop(last)
        else:
            inside.append(copy.deepcopy(inside[last]))
    return value


def scrambled(text: str, draw: random.Random) -> str:
    """A text with pieces cut, doubled, moved or put in."""
    for _ in range(draw.choice([1, 1, 2, 5])):
        at, end = sorted(draw.randint(0, len(text)) for _ in range(2))
        text = {
            0: lambda t, a, e: t[:a] + t[e:],
            1: lambda t, a, e: t[:e] + t[a:],
            2: lambda t, a, e: t[:a] + draw.choice(SNIPPETS) * draw.choice([1, 1, 3, 200]) + t[a:],
            3: lambda t, a, e: t[:a] + chr(draw.choice([0, 9, 10, 32, 35, 133, 0x2028, 0x1F600])) + t[a:],
            4: lambda t, a, e: t[:a],
        }[draw.randrange(5)](text, at, end)
    return text


def harmed(content: bytes, draw: random.Random) -> bytes:
    """Bytes with some of them changed, cut off, or all gone."""
    how = draw.randrange(5)
    if how == 0:
        return b""
    if how == 1:
        return content[: draw.randint(0, len(content))]
    if how == 2:
        return draw.randbytes(draw.randint(1, 200))
    changed = bytearray(content)
    for _ in range(draw.choice([1, 3, 20])):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def make_recipe(folder: Path, draw: random.Random) -> list[object]:
    raw = valid(folder)
    raw["method"] = draw.choice([raw["method"], {"name": draw.choice(METHODS)}])
    value = raw if draw.random() < 0.3 else disturbed(raw, draw)
    text = yaml.safe_dump(value, allow_unicode=True) if value is not raw else scrambled(yaml.safe_dump(raw), draw)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
    more: list[object] = []
    if draw.random() < 0.2:
        more = [f"{draw.choice(['seed', 'lora.r', 'data.limit', 'method.keep', 'a.b', ''])}={draw.choice(WEIRD)}"]
    return ["train", folder / "recipe.yaml", *more, "--dry-run"]


def make_suite(folder: Path, draw: random.Random) -> list[object]:
    base = valid(folder)
    base.pop("output_dir"), base.pop("task"), base.pop("method")
    suite = {
        "base": base,
        "tasks": ["text-classification"],
        "methods": {"lora": "lora", "ours": {"method": {"name": "weightlora", "keep": 3, "after": 3}}},
        "settings": {"usual": {}, "other": {"lora": {"r": 2}}},
        "seeds": [0, 1],
        "reference": "lora",
        "tune": {"grid": {"training.learning_rate": [1e-3, 1e-2]}, "validation": 0.2},
        "output_dir": str(folder / "runs"),
    }
    value = disturbed(suite, draw)
    text = yaml.safe_dump(value) if draw.random() < 0.7 else scrambled(yaml.safe_dump(suite), draw)
    (folder / "suite.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
    return ["bench", folder / "suite.yaml", draw.choice(["--dry-run", "--table"])]


def make_data(folder: Path, draw: random.Random) -> list[object]:
    rows = questions()
    form = draw.choice(["jsonl", "json", "csv", "tsv"])
    if draw.random() < 0.5:
        rows = disturbed(rows, draw)
    if form == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif form == "json":
        text = json.dumps(rows)
    else:
        mark = "," if form == "csv" else "\t"
        lines = [[str(v) for v in row.values()] if isinstance(row, dict) else [str(row)] for row in rows]
        text = "\n".join(mark.join(line) for line in [["question", "topic"], *lines]) + "\n"
    content = text.encode("utf-8", "surrogatepass")
    if draw.random() < 0.7:
        content = harmed(content, draw)
    elif draw.random() < 0.5:
        content = text.replace("o", "\u00f6").encode(draw.choice(["latin-1", "utf-16", "utf-8-sig"]), "replace")
    (folder / f"data.{form}").write_bytes(content)
    raw = valid(folder)
    raw["data"]["train"] = str(folder / f"data.{form}")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return ["train", folder / "recipe.yaml", "--dry-run"]


def make_run(folder: Path, draw: random.Random) -> list[object]:
    """A finished run of which some files are damaged or gone, to be exported, or to go on."""
    shutil.copytree(SHARED / "run", folder / "run")
    files = sorted(path for path in (folder / "run").rglob("*") if path.is_file())
    for file in draw.sample(files, draw.choice([1, 1, 2, 5])):
        if draw.random() < 0.2:
            file.unlink()
        elif file.suffix in (".json", ".yaml", ".jsonl") and draw.random() < 0.5:
            file.write_text(scrambled(file.read_text(), draw), encoding="utf-8", errors="surrogateescape")
        else:
            file.write_bytes(harmed(file.read_bytes(), draw))
    if draw.random() < 0.5:
        return ["export", folder / "run", folder / "out", *draw.choice([[], ["--portable"], ["--merged"]])]
    raw = yaml.safe_load((SHARED / "recipe.yaml").read_text())
    raw |= {"output_dir": str(folder / "run")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return ["train", folder / "recipe.yaml", "--resume"]


def named(file: Any) -> list[str]:
    """The `output_dir` of a recipe or suite, and what a path of it that does not exist needs above it."""
    try:
        folder = Path(os.path.abspath(yaml.safe_load(Path(file).read_text(encoding="utf-8"))["output_dir"]))
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
    except Exception:
        return []  # it names none
    return [str(missing[-1] if missing else folder / ".weightlora-")]


def valid(folder: Path) -> dict[str, Any]:
    raw = recipe(
        folder, method={"name": "weightlora", "keep": 3, "after": 3}, training={"max_steps": 4, "use_cpu": True}
    )
    raw |= {"model": str(SHARED / "model"), "generation": {"num_beams": None}, "seed": 3}
    raw["data"]["train"] = str(SHARED / "train.jsonl")
    raw["lora"] |= {"target_modules": ["query", "value"]}
    return raw


KINDS: dict[str, tuple[Callable[[Path, random.Random], list[object]], float]] = {
    "recipe": (make_recipe, 0.5),
    "suite": (make_suite, 0.2),
    "data": (make_data, 0.25),
    "run": (make_run, 0.05),
}


# -- how it ends -------------------------------------------------------------------------------------------------------

WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate", "os.symlink", "os.link")
touched: list[str] = []
allowed: list[str] = []


def watch() -> None:
    """Note everything that is written outside the folders of a case."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WRITES or (event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
            path = str(arguments[0])
            if not path.isdigit() and not any(os.path.abspath(path).startswith(top) for top in allowed):
                touched.append(f"{event} {path}")

    sys.addaudithook(hook)


class Hangs(BaseException):
    """A case takes too long. No `TimeoutError`, which is an `OSError`: the command would make a message of it."""


def fails(arguments: list[object], limit: float = LIMIT, codes: tuple[int | None, ...] = (0, None, 2)) -> str | None:
    """What is wrong with how the command ends; None if nothing is."""
    out, err = io.StringIO(), io.StringIO()

    def too_long(*_: Any) -> None:
        raise Hangs

    touched.clear()
    for timer, number, seconds in (
        (signal.ITIMER_PROF, signal.SIGPROF, limit),
        (signal.ITIMER_REAL, signal.SIGALRM, WAITS),
    ):
        signal.signal(number, too_long)
        signal.setitimer(timer, seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            sys.argv = ["weightlora", *map(str, arguments)]
            cli.main()
    except SystemExit as ended:
        if ended.code not in codes:
            return f"exit code {ended.code}: {err.getvalue()[-300:]}"
    except BaseException as error:
        import traceback

        return "".join(traceback.format_exception(error)[-3:])[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if "Traceback" in err.getvalue():
        return f"a traceback: {err.getvalue()[-1500:]}"
    message = next((line for line in err.getvalue().splitlines() if line.startswith("weightlora: ")), "")
    if len(message) > 3000:
        return f"a message of {len(message):,} characters: {message[:200]}"
    written = [what for what in touched if not is_trial(what)]
    return f"touched {written[:3]}" if written else None


def is_trial(what: str) -> bool:
    """A folder of a name of ours, gone again: whether `output_dir` could be made is tried where it would be."""
    path = what.partition(" ")[2]
    top = next((p for p in (Path(path), *Path(path).parents) if p.name.startswith(durable.OURS)), None)
    return top is not None and not top.exists()


SHARED = Path()
METHODS: list[str] = []


def main(arguments: list[str] | None = None) -> None:
    """Print counts, and exit with 1 if anything went wrong."""
    global SHARED
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS), help="one kind of case")
    parser.add_argument("--keep", action="store_true", help="leave the folders of cases that went wrong")
    given = parser.parse_args(arguments)
    top = workplace("fuzz-")
    METHODS.extend(info.name for info in methods.list_methods())
    SHARED = top / "shared"
    raw = valid(SHARED)
    raw["training"] |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    (SHARED / "recipe.yaml").write_text(yaml.safe_dump(raw))
    if wrong := fails(["train", SHARED / "recipe.yaml"], limit=WAITS, codes=(0, None)):
        raise SystemExit(f"the valid recipe fails: {wrong}")
    watch()
    kinds = [given.only] if given.only else list(KINDS)
    counts, bad = Counter(), Counter()
    with Progress() as progress:
        bar = progress.add_task("cases", total=given.cases)
        for number in range(given.cases):
            draw = random.Random(f"{given.seed}/{number}")
            kind = draw.choices(kinds, [KINDS[kind][1] for kind in kinds])[0]
            folder = top / f"case-{number}"
            folder.mkdir()
            allowed[:] = [str(folder), str(top / "cache"), "/dev/", tempfile.gettempdir() + "/tmp"]
            cwd = os.getcwd()
            os.chdir(folder)
            arguments = KINDS[kind][0](folder, draw)
            allowed.extend(named(arguments[1]))
            wrong = fails(arguments)
            os.chdir(cwd)
            allowed.append(str(top))
            counts[kind] += 1
            if wrong is not None:
                bad[kind] += 1
                progress.console.print(f"WRONG {kind} {number}: {wrong}", markup=False, highlight=False, soft_wrap=True)
            if wrong is None or not given.keep:
                shutil.rmtree(folder)
            progress.update(bar, advance=1)
    print(", ".join(f"{count:,} of {kind}" for kind, count in counts.items()), f"- {sum(bad.values())} went wrong")
    if not given.keep or not bad:
        shutil.rmtree(top)
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
