"""Conversations in every layout become messages; the loss is on the assistant's tokens and on no other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_chat import CHATML, WORDS, save_tiny_llama
from tiny_text import write_jsonl

from weightlora.errors import ConfigError
from weightlora.tasks import get_task
from weightlora.tasks.base import Encoded, Format, Part
from weightlora.tasks.conversations import Message, read_conversation
from weightlora.tasks.data import Source, load_splits
from weightlora.training.chat_templates import CHAT_TEMPLATES, read_chat_template
from weightlora.training.heads import HEADS
from weightlora.training.recipe import parse_recipe
from weightlora.training.run import dry_run, run

TASK = get_task("instruction-tuning")
ASKED = (Message("user", "bread or soup"), Message("assistant", "soup"))
AGAIN = (*ASKED, Message("user", "drum or song"), Message("assistant", "song or drum"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_tiny_llama(tmp_path / "model"))


def encode(conversations: list[Any], tokenizer: Any, max_length: int = 256, **form: Any) -> Encoded:
    from datasets import Dataset

    part = Part(Dataset.from_dict({"messages": [""] * len(conversations)}), conversations)
    return TASK.encode(part, tokenizer, Format(max_length, **form), training=True)


def learnt(encoded: Encoded, tokenizer: Any, row: int = 0) -> list[str]:
    """What is learnt, token by token."""
    ids, labels = encoded.features[row]["input_ids"], encoded.features[row]["labels"]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return [tokenizer.decode([label]) for label in labels if label != -100]


TURN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PART = {"type": "text", "text": "a"}
CALL = {"function": {"name": "look", "arguments": {"in": "drum"}}}
TOOL = {"type": "function", "function": {"name": "look", "description": "x", "parameters": {"type": "object"}}}
CALLED = [
    {"role": "user", "content": "bread or soup"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "look", "content": "song"},
    {"role": "assistant", "content": "soup"},
]


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "conversation"),
    [
        ({"instruction": "bread or soup", "input": "", "output": "soup"}, ASKED),
        ({"instruction": "bread or soup", "input": None, "output": "soup"}, ASKED),
        ({"instruction": "bread", "input": "soup", "output": "x"}, (("user", "bread\n\nsoup"), ("assistant", "x"))),
        ({"conversations": [{"from": "human", "value": "bread or soup"}, {"from": "gpt", "value": "soup"}]}, ASKED),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            (("system", "s"), ("user", "a"), ("assistant", "b")),
        ),
        (
            {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant", "user")], "system": "s"},
            (("system", "system"), ("user", "user"), ("assistant", "assistant")),
        ),
        (
            {"conversations": [{"role": "user", "content": "a", "from": None}, {"from": "gpt", "value": "b"}]},
            (("user", "a"), ("assistant", "b")),
        ),
        (
            {
                "messages": [
                    {"role": "developer", "content": "s"},
                    *({"role": r, "content": r} for r in ("user", "model")),
                ]
            },
            (("system", "s"), ("user", "user"), ("assistant", "model")),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [PART, PART]},
                    {"role": "assistant", "content": "b", "weight": 1},
                ]
            },
            (("user", "aa"), ("assistant", "b")),
        ),
        (
            {
                "messages": [
                    *TURN,
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d", "train": False},
                ]
            },
            (("user", "a"), ("assistant", "b")),
        ),
    ],
)
def test_every_layout_becomes_messages_up_to_the_last_answer(row: dict[str, Any], conversation: Any) -> None:
    assert [(m.role, m.content) for m in read_conversation(row)] == [tuple(m[:2]) for m in conversation]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"instruction": None, "output": "x"}, "the instruction is missing"),
        ({"instruction": " ", "output": "x"}, "the instruction is empty"),
        ({"instruction": "a", "input": 3, "output": "x"}, "the input is 3, not text"),
        ({"instruction": "a", "output": None}, "the output is missing"),
        ({"messages": "[]"}, "messages is '[]'; give a list such as"),
        ({"messages": []}, "there is no message of the assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "there is no message of the assistant"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the assistant speaks before the user"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "message 1 is from 'usr'; did you mean 'user'?"),
        ({"messages": [{"text": "a"}]}, "message 1 is from None (there can be: system, developer, user, human"),
        ({"messages": [{"role": "user", "content": None}]}, "the content of message 1 is missing"),
        ({"conversations": [{"from": "human", "value": ["a"]}]}, "the content of message 1 is ['a'], not text"),
        ({"messages": [TURN[0], {**TURN[1], "weight": 0.5}]}, "the weight of message 2 is 0.5; there can be 0 or 1"),
        ({"messages": [TURN[0], {**TURN[1], "weight": 0}]}, "no answer is to be learnt"),
        (
            {"messages": [TURN[0], {**TURN[1], "tool_calls": [{"id": "1"}]}]},
            "message 2 has the call {'id': '1'}; give {'function",
        ),
        (
            {"messages": [TURN[0], {"role": "tool", "content": "1"}, TURN[1]]},
            "message 2 is the result of a tool that nobody",
        ),
        ({"messages": [{**TURN[0], "tool_calls": [CALL]}, TURN[1]]}, "message 1 calls a tool, and is from 'user'"),
        ({"messages": [TURN[0], {**TURN[1], "mask": True}]}, "message 2 has 'mask', and it is not said whether"),
        ({"messages": [TURN[0], {**TURN[1], "reasoning_content": "r"}]}, "message 2 has 'reasoning_content', and"),
        ({"messages": [TURN[0], {**TURN[1], "name": 3}]}, "the name in message 2 is 3, not text"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]},
            "the call of a tool in message 2 is 'f()', which is no JSON",
        ),
        (
            {"messages": [TURN[0], {**TURN[1], "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
            "the arguments of f in message 2 are [1]; give an object",
        ),
        ({"messages": TURN, "tools": "look"}, "the tools is 'look', which is no JSON"),
        ({"messages": TURN, "tools": [{"type": "function"}]}, "the tools have {'type': 'function'}, which has no name"),
        ({"messages": [{"role": "user", "content": [PART, {"type": "image"}]}]}, "has a part of type 'image'"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], says: str) -> None:
    from datasets import Dataset

    good = {"messages": [m._asdict() for m in ASKED], "instruction": "a", "output": "b"}
    with pytest.raises(ValueError) as caught:
        read_conversation(row)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"^Row 2 of rows: there is no message"):
        TASK.read_labels(Dataset.from_list([{"messages": good["messages"]}, {"messages": []}]), "rows")


def as_rows() -> dict[str, dict[str, Any]]:
    """The same conversation with a tool as files have it."""
    text = json.dumps({"in": "drum"})
    openai = [dict(m) for m in CALLED]
    openai[1] = {**CALLED[1], "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": text}}]}
    older = [dict(m) for m in CALLED]
    older[1] = {**CALLED[1], "tool_calls": None, "function_call": {"name": "look", "arguments": text}}
    older[2] = {**CALLED[2], "role": "function"}
    filled = [{"tool_calls": None, "name": None, "content": None, **m} for m in CALLED]
    filled[1]["tool_calls"] = [{"function": {"name": "look", "arguments": {"in": "drum", "of": None}}}]
    turns = [
        ("human", "bread or soup"),
        ("function_call", json.dumps({"name": "look", "arguments": {"in": "drum"}})),
        ("observation", "song"),
        ("gpt", "soup"),
    ]
    return {
        "Hugging Face": {"messages": CALLED, "tools": [TOOL]},
        "OpenAI": {"messages": openai, "tools": json.dumps([TOOL])},
        "OpenAI, before": {"messages": older, "tools": [TOOL]},
        "filled in by a reader": {"messages": filled, "tools": [{**TOOL, "strict": None}]},
        "LLaMA-Factory": {
            "conversations": [{"from": f, "value": v} for f, v in turns],
            "tools": json.dumps([TOOL]),
        },
    }


@pytest.mark.parametrize("layout", as_rows())
@pytest.mark.parametrize("family", ["qwen3_instruct_2507", "glm4moe", "llama3_1"])
def test_calls_of_tools_are_what_the_template_writes(tokenizer, family: str, layout: str) -> None:
    """Whatever the layout; both answers are learnt, the call with them, and nothing that the tool said."""
    tokenizer.chat_template = read_chat_template(trl_template(family))
    conversation = read_conversation(as_rows()[layout])
    told = [{**m, "content": m["content"] or ""} for m in CALLED]
    wanted = tokenizer.apply_chat_template(told, tools=[TOOL], tokenize=False)
    encoded = encode([conversation], tokenizer, 4000)
    expected = tokenizer(wanted, add_special_tokens=False, verbose=False)["input_ids"]
    if layout != "LLaMA-Factory":  # which does not name the tool in its result
        assert encoded.features[0]["input_ids"] == expected
    said = "".join(learnt(encoded, tokenizer))
    assert "look" in said and "drum" in said and "soup" in said and "song" not in said and "description" not in said


@pytest.mark.parametrize("marked", [False, True])
def test_a_template_that_knows_no_tools_is_refused(tokenizer, marked: bool) -> None:
    tokenizer.chat_template = marked_template() if marked else CHATML
    for row, says in (
        ({"messages": CALLED, "tools": [TOOL]}, "leaves out the tool 'look'"),
        ({"messages": CALLED}, "leaves out the call of the tool 'look'"),
        ({"messages": [{**TURN[0], "name": "Ann"}, TURN[1]]}, "leaves out the `name` of a message of the user 'Ann'"),
    ):
        with pytest.raises(ConfigError, match=says):
            encode([read_conversation(row)], tokenizer)


def trl_template(name: str) -> str:
    path = parse_recipe(recipe(model={"name": "x", "chat_template": f"package:trl/chat_templates/{name}.jinja"}))
    assert path.model.chat_template is not None
    return path.model.chat_template


def test_keys_of_messages_that_nothing_reads_are_named(caplog) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"messages": [{**m, "id": "7", "lang": None} for m in TURN]}])
    TASK.read_labels(rows, "a.jsonl")
    assert caplog.messages == ["messages of a.jsonl have keys that are not read: 'id'."]


def test_layouts_are_recognised_by_their_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    alpaca = [{"instruction": f"bread {i}", "input": "", "output": "soup", "text": "x"} for i in range(4)]
    write_jsonl(tmp_path / "alpaca.jsonl", alpaca)
    write_jsonl(tmp_path / "plain.jsonl", [{"q": "bread", "a": a, "instruction": "x"} for a in ("soup", "salt")])
    share = [{"conversations": [{"from": "human", "value": "bread 0"}, {"from": "gpt", "value": "soup"}]}]
    write_jsonl(tmp_path / "share.jsonl", share)

    def load(path: str, **columns: str | None) -> Any:
        return load_splits(TASK, Source(path), Source("share.jsonl"), None, columns).train

    assert load("alpaca.jsonl").rows.column_names == ["instruction", "input", "output"]
    assert load("alpaca.jsonl", input=None).rows.column_names == ["instruction", "output"]
    assert load("share.jsonl").targets == [(Message("user", "bread 0"), Message("assistant", "soup"))]
    own = load_splits(TASK, Source("plain.jsonl"), 0.5, None, {"instruction": "q", "output": "a"})
    assert own.train.targets[0][0] == Message("user", "bread") and own.train.targets[0][1].content in ("soup", "salt")
    for columns, says in [
        ({}, r"none of the layouts of the task \(messages; conversations; instruction, output\); name its columns"),
        ({"instruction": "qq", "output": "a"}, "`data.columns.instruction` is 'qq', not a column"),
        ({"question": "q"}, "`data.columns.question` is not read by task 'instruction-tuning'"),
        ({"messages": "q", "output": "a"}, "none of the layouts"),
    ]:
        with pytest.raises(ConfigError, match=says):
            load("plain.jsonl", **columns)


def test_conversations_in_both_parts_are_reported(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "a.jsonl", [{"instruction": "bread", "output": "soup"}, {"instruction": "x", "output": "y"}])
    write_jsonl(tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "bread"}, ASKED[1]._asdict()]}])
    load_splits(TASK, Source("a.jsonl"), Source("b.jsonl"), None, {})
    assert "1 of 1 validation rows are in the training data too" in caplog.text


# -- what is learnt --------------------------------------------------------------------------------------------------


def test_all_answers_are_learnt_with_the_token_that_ends_them(tokenizer) -> None:
    encoded = encode([AGAIN], tokenizer)
    assert tokenizer.decode(encoded.features[0]["input_ids"]) == tokenizer.apply_chat_template(
        [m._asdict() for m in AGAIN], tokenize=False
    )
    assert learnt(encoded, tokenizer) == ["soup", "<|end|>", "song", " or", " drum", "<|end|>"]


def test_an_answer_of_weight_0_is_read_and_not_learnt(tokenizer) -> None:
    """Whether the template marks answers or not: the tokens are those of the whole, the labels those of the others."""
    quiet = tuple(m._replace(learn=m is not AGAIN[first_answer(AGAIN)]) for m in AGAIN)
    plain = encode([quiet, ASKED], tokenizer)
    assert plain.features["input_ids"] == encode([AGAIN, ASKED], tokenizer).features["input_ids"]
    assert learnt(plain, tokenizer) == ["song", " or", " drum", "<|end|>"]
    assert learnt(plain, tokenizer, 1) == ["soup", "<|end|>"]
    tokenizer.chat_template = marked_template()
    assert encode([quiet, ASKED], tokenizer).features.to_dict() == plain.features.to_dict()


def first_answer(conversation: Any) -> int:
    return next(number for number, message in enumerate(conversation) if message.is_answer)


def marked_template() -> str:
    turn = "{{- message['content'] + '<|end|>' }}"
    marked = f"{{%- if message['role'] == 'assistant' %}}{{%- generation %}}{turn}{{%- endgeneration %}}"
    return CHATML.replace(turn, f"{marked}{{%- else %}}{turn}{{%- endif %}}")


def test_marks_in_the_template_say_the_same(tokenizer) -> None:
    usual = encode([AGAIN, ASKED], tokenizer).features.to_dict()
    tokenizer.chat_template = marked_template()
    assert tokenizer.chat_template != CHATML
    assert encode([AGAIN, ASKED], tokenizer).features.to_dict() == usual


@pytest.mark.parametrize("family", ["llama3", "gemma", "cohere", "qwen3_instruct_2507"])
def test_answers_are_those_that_trl_has_marked(tokenizer, family: str) -> None:
    """TRL's copies of these templates differ from the originals by the marks alone."""
    learnt = []
    for name in (family, f"{family}_training"):
        tokenizer.chat_template = read_chat_template(trl_template(name))
        learnt.append(encode([AGAIN, ASKED], tokenizer).features.to_dict())
    assert learnt[0] == learnt[1]


def test_the_alpaca_template_needs_no_token_of_its_own(tokenizer) -> None:
    tokenizer.chat_template = CHAT_TEMPLATES["alpaca"]
    text = tokenizer.apply_chat_template([m._asdict() for m in ASKED], tokenize=False)
    assert text == (
        "<|begin|>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nbread or soup\n\n### Response:\nsoup<|end|>\n\n"
    )
    with_system = tokenizer.apply_chat_template([{"role": "system", "content": "Be kind."}], tokenize=False)
    assert with_system == "<|begin|>Be kind.\n\n"
    assert learnt(encode([AGAIN], tokenizer), tokenizer) == ["soup", "<|end|>", "song", " or", " drum", "<|end|>"]


def test_a_template_without_an_end_of_turn_learns_what_ends_it(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert learnt(encode([ASKED], tokenizer), tokenizer) == ["soup", "\n"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ({"rag": CHATML, "tool": CHATML}, "has no chat template"),
        (None, "has no chat template; take an instruction-tuned model, or set `model.chat_template`"),
        (
            "{% for m in messages[-1:] %}{{ m['content'] }}{% endfor %}",
            "so its answers cannot be told apart; set `model.chat_template`",
        ),
        ("{{ raise_exception('no users') }}", "refuses the conversation that begins with 'bread or soup': no users"),
        ("{% if %}", "refuses the conversation that begins with"),
        ("{% for m in messages %}{{ m['role'] }}:{% endfor %}", "leaves out the answer 'soup': it gives 'assistant:'"),
    ],
)
def test_templates_that_cannot_work(tokenizer, template: Any, says: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ConfigError) as caught:
        encode([AGAIN], tokenizer)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_encoder_decoder_is_refused(tokenizer) -> None:
    with pytest.raises(ConfigError, match="needs a decoder such as Llama"):
        encode([ASKED], tokenizer, is_encoder_decoder=True)


def test_cutting_leaves_an_answer_or_the_row_out(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    whole = encode([AGAIN], tokenizer).features[0]
    first = next(i for i, label in enumerate(whole["labels"]) if label != -100)
    with caplog.at_level("INFO"):
        kept = encode([AGAIN, ASKED], tokenizer, max_length=first + 1)
    assert [len(ids) for ids in kept.features["input_ids"]] == [first + 1] * 2
    assert learnt(kept, tokenizer) == ["soup"]
    assert f"2 of 2 conversations are longer than {first + 1} tokens" in caplog.text
    with pytest.raises(ConfigError, match="None of 1 conversations can be learnt from"):
        encode([AGAIN], tokenizer, max_length=first)


def test_empty_answers_are_left_out_and_counted(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    empty = (ASKED[0], Message("assistant", " "))
    encoded = encode([empty, ASKED], tokenizer)
    assert len(encoded.features) == 1 and learnt(encoded, tokenizer) == ["soup", "<|end|>"]
    assert "1 of 2 conversations are left out" in caplog.text


# -- scores ----------------------------------------------------------------------------------------------------------


def test_perplexity_and_accuracy_by_hand(tokenizer) -> None:
    """Two rows over a vocabulary of two; what is learnt has probabilities 3/4, 1/4 and 1/2 (a tie, won by token 0)."""
    labels = torch.tensor([[-100, 0, 1], [-100, -100, 0]])
    odds = math.log(3)
    logits = torch.tensor([[[odds, 0.0], [odds, 0.0], [9.0, 9.0]], [[9.0, 0.0], [1.0, 1.0], [9.0, 9.0]]])
    outputs = HEADS["next-token"].outputs
    assert outputs is not None
    rows = outputs(logits, labels)
    assert rows.tolist() == [
        pytest.approx([-math.log(3 / 4) - math.log(1 / 4), 1, 2]),
        pytest.approx([math.log(2), 1, 1]),
    ]
    scores = encode([ASKED], tokenizer).score(np.asarray(rows), None)
    assert scores["perplexity"] == pytest.approx((3 / 4 * 1 / 4 * 1 / 2) ** (-1 / 3), rel=1e-6)
    assert scores["token_accuracy"] == pytest.approx(2 / 3)


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    save_tiny_llama(tmp_path / "model")
    rows = [{"instruction": f"{a} or {b}", "output": a} for a in WORDS for b in WORDS]
    write_jsonl(tmp_path / "train.jsonl", rows)
    return tmp_path


def recipe(**entries: Any) -> dict[str, Any]:
    return {
        "model": "model",
        "task": "instruction-tuning",
        "data": {"train": "train.jsonl", "validation": 0.25, "max_length": 64},
        "method": {"name": "weightlora", "keep": 3, "after": 2},
        "lora": {"r": 4, "lora_dropout": 0.0},
        "training": {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
        "output_dir": "run",
        **entries,
    }


def test_a_run_learns_to_answer_and_scores_what_stock_peft_scores(folder: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    training = {"num_train_epochs": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    assert dry_run(parse_recipe(recipe(metric="token_accuracy"))).adapters
    with pytest.raises(ConfigError, match="`metric` is 'f2'; choose one of: loss, perplexity, token_accuracy"):
        dry_run(parse_recipe(recipe(metric="f2")))
    metrics = run(parse_recipe(recipe(method="lora", training=training)))
    assert metrics["primary"] == "perplexity" and metrics["adapters"]["attached"]
    assert metrics["after"]["perplexity"] < metrics["before"]["perplexity"] / 10
    assert metrics["after"]["token_accuracy"] >= 0.5
    assert metrics["trainable_parameters"]["head"] == 0

    model = AutoPeftModelForCausalLM.from_pretrained("run/adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained("run/adapter")
    held_out = load_splits(TASK, Source("train.jsonl"), 0.25, None, {}).validation
    loss = tokens = 0.0
    for row in TASK.encode(held_out, tokenizer, Format(64), training=False).features:
        count = sum(label != -100 for label in row["labels"])
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "labels")}
        with torch.no_grad():
            loss, tokens = loss + count * model(**inputs).loss.item(), tokens + count
    assert math.exp(loss / tokens) == pytest.approx(metrics["after"]["perplexity"], rel=1e-4)


def test_resume_ends_where_a_run_without_interruption_ends(folder: Path) -> None:
    whole = {**recipe()["training"], "max_steps": 6, "save_steps": 3, "save_strategy": "steps"}
    whole["lr_scheduler_type"] = "constant"
    run(parse_recipe(recipe(training={**whole, "max_steps": 3})))
    resumed = run(parse_recipe(recipe(training=whole)), resume=True)
    straight = run(parse_recipe(recipe(training=whole, output_dir="straight")))
    assert (resumed["seconds"]["since_step"], straight["seconds"]["since_step"]) == (3, 0)
    assert resumed["after"] == straight["after"] and resumed["steps"] == 6
    assert resumed["adapters"]["kept"] == straight["adapters"]["kept"] and len(resumed["adapters"]["kept"]) == 3


def test_an_export_is_checked_and_keeps_the_chat_template(folder: Path) -> None:
    from transformers import AutoTokenizer

    from weightlora import export

    save_tiny_llama(folder / "base", template=None)
    long = {**recipe()["data"], "max_length": 256}
    with pytest.raises(ConfigError, match="has no chat template"):
        dry_run(parse_recipe(recipe(model="base")))
    run(parse_recipe(recipe(model={"name": "base", "chat_template": "alpaca"}, data=long)))
    export(folder / "run", folder / "out", merged=True)
    assert AutoTokenizer.from_pretrained(folder / "out").chat_template == CHAT_TEMPLATES["alpaca"]


def test_chat_templates_are_names_or_files(folder: Path) -> None:
    Path("own.jinja").write_text(CHATML)
    assert read_chat_template("own.jinja") == CHATML
    Path("empty.jinja").write_text(" ")
    Path("binary.jinja").write_bytes(b"\xff\xfe")
    for name, says in [
        ("alpca", "did you mean 'alpaca'?"),
        ("empty.jinja", "holds no text; give a Jinja file"),
        ("binary.jinja", "holds no text; give a Jinja file"),
    ]:
        with pytest.raises(ConfigError, match=says):
            dry_run(parse_recipe(recipe(model={"name": "model", "chat_template": name})))
    assert not Path("run").exists()
