"""Rows of the three usual layouts of instruction data as conversations, checked.

{"messages": [{"role": "user", "content": "Who wrote Hamlet?"}, {"role": "assistant", "content": "Shakespeare."}]}
{"conversations": [{"from": "human", "value": "Who wrote Hamlet?"}, {"from": "gpt", "value": "Shakespeare."}]}
{"instruction": "Translate to French.", "input": "Good morning", "output": "Bonjour"}

The first two are OpenAI's and ShareGPT's and may have a column `system` beside them; the last is Alpaca's. An answer
with `"weight": 0` (OpenAI) or `"train": false` (Axolotl) is read and not learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from weightlora.errors import did_you_mean, short

# {role of a task: usual column}; of two similar layouts the one with more columns comes first.
TURNS = (
    {"messages": "messages", "system": "system"},
    {"messages": "messages"},
    {"conversations": "conversations", "system": "system"},
    {"conversations": "conversations"},
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
}

# Keys of a message that say something nobody would carry out here, and what to do about it.
_NOT_CARRIED_OUT = {
    "tool_calls": "calls of tools are not rendered",
    "function_call": "calls of functions are not rendered",
    "tool_call_id": "results of tools are not rendered",
    "mask": "it is not said whether it hides or shows a message; use `weight` or `train`",
}


class Message(NamedTuple):
    """One turn of a conversation; `role` is `system`, `user` or `assistant`. `learn` counts for answers."""

    role: str
    content: str
    learn: bool = True

    @property
    def is_answer(self) -> bool:
        return self.role == "assistant"

    @property
    def is_learnt(self) -> bool:
        return self.is_answer and self.learn


Conversation = tuple[Message, ...]


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
    return tuple(messages[: learnt[-1] + 1])


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
        if turn.get(key) not in (None, [], {}, ""):
            raise ValueError(f"{which} has {key!r}, and {why}; take it out or remove the row.")
    return Message(_ROLES[name], _content(turn.get(content), f"the content of {which}"), _learnt(turn, which))


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
