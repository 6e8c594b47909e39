"""Rows of the three usual layouts of instruction data as conversations, checked.

{"messages": [{"role": "user", "content": "Who wrote Hamlet?"}, {"role": "assistant", "content": "Shakespeare."}]}
{"conversations": [{"from": "human", "value": "Who wrote Hamlet?"}, {"from": "gpt", "value": "Shakespeare."}]}
{"instruction": "Translate to French.", "input": "Good morning", "output": "Bonjour"}

The first two are OpenAI's and ShareGPT's and may have a column `system` beside them; the last is Alpaca's.
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
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}


class Message(NamedTuple):
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str

    @property
    def is_answer(self) -> bool:
        return self.role == "assistant"


Conversation = tuple[Message, ...]


def read_conversation(row: Mapping[str, Any]) -> Conversation:
    """The messages of a row up to the last answer.

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
    return tuple(messages[: answers[-1] + 1])


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
    return Message(_ROLES[name], _text(turn.get(content), f"the content of {which}"))


def _text(value: Any, what: str) -> str:
    if value is None:
        raise ValueError(f"{what} is missing; fill it in or remove the row.")
    if not isinstance(value, str):
        raise ValueError(f"{what} is {short(value)}, not text; fix the row.")
    return value
