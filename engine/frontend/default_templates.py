"""Chat templates of model families whose checkpoints were published without one."""

from engine.multimodal.families import MM_FAMILIES

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

# For random weights without a tokenizer, which can be given images in chats only.
PLAIN = "{% for message in messages %}{{ message.content }}{{ '\\n' }}{% endfor %}"

# By model type in config.json.
DEFAULT_TEMPLATES: dict[str, str] = {"llava": LLAVA}


def default_template(family: str | None, *, stand_in: bool) -> str | None:
    """The template of a model without one; None if it has none, so that chats are refused.

    Args:
        family: model type in config.json.
        stand_in: whether a stand-in replaces its tokenizer.
    """
    if stand_in:
        return PLAIN if family in MM_FAMILIES else None
    return DEFAULT_TEMPLATES.get(family or "")
