"""Chat templates of model families whose checkpoints were published without one."""

# LLaVA 1.5, which was tuned on Vicuna's format: USER: <image>\nWhat is this? ASSISTANT: A cat.</s>
LLAVA = """\
{%- for message in messages %}
    {%- if message.role == 'user' %}{{ 'USER: ' }}{% elif message.role == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}
    {%- if message.content is string %}{{ message.content }}
    {%- else %}
        {%- for part in message.content if part.type == 'image' %}{{ '<image>\\n' }}{% endfor %}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
    {%- endif %}
    {%- if message.role == 'assistant' %}{{ eos_token | default('</s>') }}
    {%- elif not loop.last or add_generation_prompt %}{{ ' ' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

# For random weights, and simulated hardware, without a tokenizer.
PLAIN = "{% for message in messages %}{{ message.content }}{{ '\\n' }}{% endfor %}"

# The published template of Molmo's first generation writes no images: they come before all texts, after the token that
# ends texts.
MOLMO = (
    "{{ bos_token if bos_token else eos_token }}"
    "{%- for message in messages if message['content'] is not string -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}<|image|>{%- endfor -%}"
    "{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif -%}"
    "{{ ' ' + message['role'].capitalize() + ': ' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' Assistant:' }}{%- endif -%}"
)
# The processor of Molmo 2 writes that token before a prompt that doesn't begin with it.
MOLMO2 = (
    "{% set prompt %}PUBLISHED{% endset %}"
    "{% set first = bos_token if bos_token else eos_token %}"
    "{{ '' if prompt.startswith(first) else first }}{{ prompt }}"
)

# By model type in config.json.
DEFAULT_TEMPLATES: dict[str, str] = {"llava": LLAVA, "molmo": MOLMO}


def with_inputs(family: str | None, sources: dict[str, str]) -> dict[str, str]:
    """The templates of a model, by name, so that they write its inputs as its own processor does."""
    if family == "molmo":
        return dict.fromkeys(sources, MOLMO)
    if family == "molmo2":
        return {name: MOLMO2.replace("PUBLISHED", source.removesuffix("\n")) for name, source in sources.items()}
    return sources


def default_template(family: str | None, *, stand_in: bool) -> str | None:
    """The template of a model without one; None if it has none, so that chats are refused.

    Args:
        family: model type in config.json.
        stand_in: whether a stand-in replaces its tokenizer.
    """
    if stand_in:
        return PLAIN
    return DEFAULT_TEMPLATES.get(family or "")
