"""Conversations tokenized with the tokenizer's chat template, and which tokens the assistant wrote.

A template that marks answers by `{% generation %}` is trusted. Any other one renders the beginnings of each
conversation, with the prompt for an answer and with the answer: the difference is the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from weightlora.errors import ConfigError, short
from weightlora.tasks.conversations import Conversation, Message

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANY_LENGTH = {"verbose": False}  # long texts are cut later

# Start and end of an answer, in characters of the rendered text.
Span = tuple[int, int]


def check_tokenizer(tokenizer: Any) -> None:
    """Refuses a tokenizer that cannot render conversations, or cannot tell which token an answer begins with."""
    try:
        tokenizer.get_chat_template()
    except ValueError:  # none, or several without a default
        raise ConfigError(
            "The model's tokenizer has no chat template; take an instruction-tuned model, or set `model.chat_template` "
            "to a Jinja file or to `alpaca`."
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"Instruction tuning needs to know the characters of each token, which {type(tokenizer).__name__} does not "
            "tell; use a model with a fast tokenizer (tokenizer.json)."
        )


def tokenized(rows: Sequence[Sequence[Message]], tokenizer: Any) -> tuple[list[list[int]], list[list[bool]]]:
    """The tokens of each conversation, and for each token whether it is part of an answer that is learnt."""
    conversations = [row if isinstance(row, Conversation) else Conversation(row) for row in rows]
    whole = all(message.learn for conversation in conversations for message in conversation if message.is_answer)
    if whole and _MARK.search(tokenizer.get_chat_template()):  # which marks all answers
        return _marked(conversations, tokenizer)
    ends = tuple({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens})
    rendered = [_rendered(conversation, tokenizer, ends) for conversation in conversations]
    texts = [text for text, _ in rendered]
    inputs = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, **_ANY_LENGTH)
    pairs = zip(inputs["offset_mapping"], rendered, strict=True)
    return inputs["input_ids"], [_inside(offsets, spans) for offsets, (_, spans) in pairs]


def _marked(conversations: Sequence[Conversation], tokenizer: Any) -> tuple[list[list[int]], list[list[bool]]]:
    options = {"return_dict": True, "return_assistant_tokens_mask": True, "tokenizer_kwargs": _ANY_LENGTH}
    rows = [_applied(conversation, tokenizer, tools=conversation.tools, **options) for conversation in conversations]
    for conversation in conversations:
        if conversation.tools or any(message.calls or message.name for message in conversation):
            _check_all_said(conversation, _applied(conversation, tokenizer, tools=conversation.tools, tokenize=False))
    return [row["input_ids"] for row in rows], [[bool(one) for one in row["assistant_masks"]] for row in rows]


def _rendered(conversation: Conversation, tokenizer: Any, ends: tuple[str, ...]) -> tuple[str, list[Span]]:
    """The text of a conversation and the spans of the answers that are learnt."""
    text = {"tools": conversation.tools, "tokenize": False}
    whole = _applied(conversation, tokenizer, **text)
    _check_all_said(conversation, whole)
    spans = []
    for number, message in enumerate(conversation):
        if message.is_learnt:
            prompt = _applied(conversation[:number], tokenizer, add_generation_prompt=True, **text)
            turn = _applied(conversation[: number + 1], tokenizer, **text)
            if not (turn.startswith(prompt) and whole.startswith(turn)):
                raise ConfigError(
                    "The chat template does not render the beginning of a conversation as it renders the whole (answer "
                    f"{short(message.content)}), so its answers cannot be told apart; set `model.chat_template` to a "
                    "copy of it with {% generation %} and {% endgeneration %} around them, such as TRL brings: "
                    "package:trl/chat_templates/qwen3_training.jinja."
                )
            _check_said(message, turn[len(prompt) :])
            spans.append((len(prompt), _end(turn, ends)))
    return whole, spans


def _check_all_said(conversation: Conversation, whole: str) -> None:
    """Templates that know nothing of tools or names leave them out in silence."""
    said = [("the tool", name) for name in conversation.tool_names]
    for message in conversation:
        said += [("the call of the tool", name) for name in message.called]
        if message.role == "tool":
            said += [("the result of a tool", message.content.strip())]
        elif message.name:
            said += [(f"the `name` of a message of the {message.role}", message.name)]
    for what, text in said:
        if text not in whole and json.dumps(text, ensure_ascii=False)[1:-1] not in whole:
            raise ConfigError(
                f"The chat template leaves out {what} {short(text)}; take a model whose template knows it, set "
                "`model.chat_template` to such a one, or take it out of the rows."
            )


def _check_said(message: Message, answer: str) -> None:
    """Templates of vision-language models skip messages that are plain text."""
    if (left_out := [name for name in message.called if name not in answer]) != []:
        raise ConfigError(f"The chat template leaves out the call of the tool {short(left_out[0])} in an answer.")
    said = message.content.rsplit("</think>", 1)[-1].strip()  # some drop earlier reasoning
    if said not in answer:
        raise ConfigError(
            f"The chat template leaves out the answer {short(message.content)}: it gives {short(answer)}; set "
            "`model.chat_template` to one for text."
        )


def _end(turn: str, ends: tuple[str, ...]) -> int:
    """Whitespace after the token that ends a turn belongs to what follows."""
    bare = turn.rstrip()
    return len(bare) if bare.endswith(ends) else len(turn)


def _applied(conversation: Sequence[Message], tokenizer: Any, *, tools: str = "", **options: Any) -> Any:
    """Templates raise arbitrary errors, for example about unknown roles."""
    try:
        messages = [message.as_template_input() for message in conversation]
        return tokenizer.apply_chat_template(messages, tools=json.loads(tools) if tools else None, **options)
    except Exception as error:
        raise ConfigError(
            f"The chat template refuses the conversation that begins with {short(conversation[0].content)}: "
            f"{' '.join(str(error).split())}"
        ) from error


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token begins in one of the spans."""
    return [end > begin and any(first <= begin < last for first, last in spans) for begin, end in offsets]
