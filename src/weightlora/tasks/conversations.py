"""Rows of the three usual layouts of instruction data as conversations, checked.

{"messages": [{"role": "user", "content": "Who wrote Hamlet?"}, {"role": "assistant", "content": "Shakespeare."}]}
{"conversations": [{"from": "human", "value": "Who wrote Hamlet?"}, {"from": "gpt", "value": "Shakespeare."}]}
{"instruction": "Translate to French.", "input": "Good morning", "output": "Bonjour"}

The first two are OpenAI's and ShareGPT's and may have columns `system` and `tools` beside them; the last is Alpaca's.
An answer with `"weight": 0` (OpenAI) or `"train": false` (Axolotl) is read and not learnt.

Tools are called by OpenAI's `tool_calls` of an answer, [{"function": {"name": "...", "arguments": {...}}}], or by
LLaMA-Factory's {"from": "function_call", "value": '{"name": "...", "arguments": {...}}'}. Their results are messages of
`tool` or `observation`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from weightlora.errors import did_you_mean, short

# {role of a task: usual column}; of two similar layouts the one with more columns comes first.
TURNS = tuple(
    {column: column for column in (turns, *others)}
    for turns in ("messages", "conversations")
    for others in (("system", "tools"), ("system",), ("tools",), ())
)
ALPACA = (
    {"instruction": "instruction", "input": "input", "output": "output"},
    {"instruction": "instruction", "output": "output"},
)

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

# Keys of a message that say something nobody would carry out here, and what to do about it.
_NOT_CARRIED_OUT = {
    "mask": "it is not said whether it hides or shows a message; use `weight` or `train`",
    "train_detail": "parts of a message cannot be left out; use `weight` or `train` for all of it",
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        "reasoning is not rendered; write it into the content as the template does",
    ),
}
_READ = {
    *("role", "from", "content", "value", "weight", "train", "name"),
    *("tool_calls", "function_call", "tool_call_id", *_NOT_CARRIED_OUT),
}
_EMPTY: tuple[Any, ...] = (None, [], {}, "")


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        learn: counts for answers.
        calls: of tools, in an answer: [{"function": {"name", "arguments"}, "type", "id"}] as JSON text.
        name: of who speaks, or of the tool.
        call_id: of the call that a tool answers.
    """

    role: str
    content: str
    learn: bool = True
    calls: str = ""
    name: str = ""
    call_id: str = ""

    @property
    def is_answer(self) -> bool:
        return self.role == "assistant"

    @property
    def is_learnt(self) -> bool:
        return self.is_answer and self.learn

    @property
    def called(self) -> list[str]:
        """Names of the tools that it calls."""
        return [call["function"]["name"] for call in json.loads(self.calls)] if self.calls else []

    def as_template_input(self) -> dict[str, Any]:
        """What chat templates of transformers read."""
        calls = {"tool_calls": json.loads(self.calls)} if self.calls else {}
        others = {"name": self.name, "tool_call_id": self.call_id}
        return {"role": self.role, "content": self.content, **calls, **{k: v for k, v in others.items() if v}}


class Conversation(tuple[Message, ...]):
    """Messages, and the tools that the assistant was given: their JSON schemas, as JSON text."""

    tools: str = ""

    def __new__(cls, messages: Iterable[Message] = (), tools: str = "") -> Conversation:
        made = super().__new__(cls, messages)
        made.tools = tools
        return made

    @property
    def tool_names(self) -> list[str]:
        return [tool.get("function", tool)["name"] for tool in json.loads(self.tools)] if self.tools else []


def read_conversation(row: Mapping[str, Any]) -> Conversation:
    """The messages of a row up to the last answer that is learnt.

    Args:
        row: {role of the task: value} of one of the layouts.

    Raises:
        ValueError: the fault of the row, as the end of a sentence that names it.
    """
    messages = _alpaca(row) if "instruction" in row else _turns(row)
    answers = [number for number, message in enumerate(messages) if message.is_answer]
    if not answers:
        raise ValueError("there is no message of the assistant, so nothing can be learnt; remove the row.")
    if not any(message.role == "user" for message in messages[: answers[0]]):
        raise ValueError("the assistant speaks before the user has said anything; remove that message or the row.")
    learnt = [number for number in answers if messages[number].learn]
    if not learnt:
        raise ValueError("no answer is to be learnt (`weight` or `train` says so of all); remove the row.")
    called = False
    for number, message in enumerate(messages, start=1):
        if message.role == "tool" and not called:
            raise ValueError(f"message {number} is the result of a tool that nobody has called; remove it or the row.")
        called = called or bool(message.calls)
    return Conversation(messages[: learnt[-1] + 1], _tools(row.get("tools")))


def unread_keys(row: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a row's messages that nothing reads, such as an id."""
    turns = row.get("messages") or row.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        yield from (key for key, value in turn.items() if key not in _READ and value not in _EMPTY)


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    request = _text(row["instruction"], "the instruction")
    more = "" if row.get("input") is None else _text(row["input"], "the input")
    if more.strip():
        request = f"{request}\n\n{more}"
    if not request.strip():
        raise ValueError("the instruction is empty; fill it in or remove the row.")
    return [Message("user", request), Message("assistant", _text(row["output"], "the output"))]


def _turns(row: Mapping[str, Any]) -> list[Message]:
    column = "messages" if "messages" in row else "conversations"
    turns = row[column]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(
            f"{column} is {short(turns)}; give a list such as "
            "[{'role': 'user', 'content': '...'}, {'role': 'assistant', 'content': '...'}]."
        )
    messages = [_message(turn, f"message {number}") for number, turn in enumerate(turns, start=1)]
    system = row.get("system")
    if system and (not messages or messages[0].role != "system"):
        messages.insert(0, Message("system", _text(system, "the system message")))
    return messages


def _message(turn: Mapping[str, Any], which: str) -> Message:
    """Files mix both spellings; JSON readers fill a row's missing keys with None."""
    role, content = ("role", "content") if turn.get("role") is not None else ("from", "value")
    name = turn.get(role)
    if name not in _ROLES:
        raise ValueError(
            f"{which} is from {name!r}{did_you_mean(str(name), list(_ROLES))} (there can be: {', '.join(_ROLES)})."
        )
    for key, why in _NOT_CARRIED_OUT.items():
        if turn.get(key) not in _EMPTY:
            raise ValueError(f"{which} has {key!r}, and {why}; take it out or remove the row.")
    value, calls = turn.get(content), _calls(turn, name, which)
    if calls and (value is None or name == "function_call"):
        value = ""
    if calls and _ROLES[name] != "assistant":
        raise ValueError(f"{which} calls a tool, and is from {name!r}; only the assistant does.")
    return Message(
        _ROLES[name],
        _content(value, f"the content of {which}"),
        _learnt(turn, which),
        calls,
        "" if turn.get("name") is None else _text(turn["name"], f"the name in {which}"),
        "" if turn.get("tool_call_id") is None else str(turn["tool_call_id"]),
    )


def _calls(turn: Mapping[str, Any], name: str, which: str) -> str:
    """The calls of a message in one form, as JSON text; nothing where there are none."""
    calls = turn.get("tool_calls") if turn.get("tool_calls") not in _EMPTY else turn.get("function_call")
    if name == "function_call":
        calls = turn.get("value") if turn.get("value") is not None else turn.get("content")
    if calls in _EMPTY:
        return ""
    found = _parsed(calls, f"the call of a tool in {which}")
    return json.dumps(
        [_call(one, which) for one in (found if isinstance(found, list) else [found])], ensure_ascii=False
    )


def _call(call: Any, which: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(
            f"{which} has the call {short(call)}; give {{'function': {{'name': '...', 'arguments': {{...}}}}}}."
        )
    arguments = _parsed(function.get("arguments") or {}, f"the arguments of {function['name']} in {which}")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of {function['name']} in {which} are {short(arguments)}; give an object.")
    own = {"id": str(call["id"])} if call.get("id") else {}
    return {**own, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(value: Any) -> str:
    """The schemas of a row's tools as JSON text."""
    tools = _parsed(value, "the tools") if value not in _EMPTY else []
    if not isinstance(tools, list):
        raise ValueError(f"the tools are {short(tools)}; give a list of functions with their JSON schemas.")
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"the tools have {short(tool)}, which has no name; give functions with their JSON schemas."
            )
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def _parsed(value: Any, what: str) -> Any:
    """JSON text, which many files hold, or the values themselves; JSON readers fill their missing keys with None."""
    if not isinstance(value, str):
        return _without_none(value)
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{what} is {short(value)}, which is no JSON; fix the row.") from None


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _learnt(turn: Mapping[str, Any], which: str) -> bool:
    for key in ("weight", "train"):
        value = turn.get(key)
        if value is not None and value not in (0, 1):
            raise ValueError(f"the {key} of {which} is {short(value)}; there can be 0 or 1, false or true.")
        if value is not None and not value:
            return False
    return True


def _content(value: Any, what: str) -> str:
    """Text, or parts of it as OpenAI's API takes them."""
    if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value) or not value:
        return _text(value, what)
    others = [part.get("type") for part in value if part.get("type") != "text"]
    if others:
        raise ValueError(f"{what} has a part of type {short(others[0])}, and only text is learnt; remove the row.")
    return "".join(_text(part.get("text"), f"a part of {what}") for part in value)


def _text(value: Any, what: str) -> str:
    if value is None:
        raise ValueError(f"{what} is missing; fill it in or remove the row.")
    if not isinstance(value, str):
        raise ValueError(f"{what} is {short(value)}, not text; fix the row.")
    return value
