"""Chat templates for tokenizers that have none: one by name, any other from a file."""

from pathlib import Path

from weightlora.errors import ConfigError, did_you_mean

# The prompt of Alpaca (Taori et al. 2023). Turns end with the tokenizer's own end-of-text token, so that base models
# learn to stop with a token they already have; none is added.
_ALPACA = """\
{{- bos_token }}
{%- if messages and messages[0]['role'] != 'system' %}
    {{- 'Below is an instruction that describes a task. ' }}
    {{- 'Write a response that appropriately completes the request.\\n\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] + '\\n\\n' }}
    {%- elif message['role'] == 'user' %}
        {{- '### Instruction:\\n' + message['content'] + '\\n\\n' }}
    {%- else %}
        {{- '### Response:\\n' + message['content'] }}{{ eos_token }}{{ '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Response:\\n' }}
{%- endif %}
"""

CHAT_TEMPLATES = {"alpaca": _ALPACA}


def read_chat_template(name: str) -> str:
    """The template of that name, or the text of that file.

    Raises:
        ConfigError: there is no such template or file, or it is empty.
    """
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    file = Path(name).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"`model.chat_template` is {name!r}, neither a file{did_you_mean(name, list(CHAT_TEMPLATES))} "
            f"nor a known template (there are: {', '.join(CHAT_TEMPLATES)})."
        )
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = ""
    if not text.strip():
        raise ConfigError(f"`model.chat_template` {name!r} holds no text; give a Jinja file.")
    return text
