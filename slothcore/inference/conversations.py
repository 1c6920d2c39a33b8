"""A conversation as the chat template writes it for an answer, with nothing of it lost on the way."""

from collections.abc import Mapping, Sequence
from typing import Any

from slothcore.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
# What OpenAI calls the system's role since its reasoning models, and what most templates know.
DEVELOPER, SYSTEM = "developer", "system"
# Who speaks often, and is heard by every template that has a word for them: their words need only stand there.
HEARD = frozenset(("user", "tool"))


def conversation_text(tokenizer: Tokenizer, messages: Sequence[Message], /, **values: Any) -> str:
    """The text of a conversation, up to where the answer begins.

    Args:
        values: what else the template reads, and `continue_final_message` or `add_generation_prompt`.
    Raises: ValueError if there is no chat template, it rejects the conversation, or it leaves out what somebody says,
        as many do without a word where they do not know the role.
    """
    goes_on = bool(values.get("continue_final_message", False))
    begins = bool(values.get("add_generation_prompt", not goes_on))
    options = {**values, "continue_final_message": goes_on, "add_generation_prompt": begins}
    # Clients send back what they were sent, with an empty list where nothing was called; templates look for the name.
    known = [{key: value for key, value in m.items() if (key, value) != ("tool_calls", [])} for m in messages]
    if DEVELOPER not in tokenizer.template_for(options.get("tools")).source:
        known = [{**m, "role": SYSTEM} if m["role"] == DEVELOPER else m for m in known]
    text = tokenizer.apply_chat_template(known, **options)
    for index, message in enumerate(known):
        if _is_left_out(tokenizer, known, index, text, options):
            raise ValueError(
                f"the chat template leaves out the text of messages[{index}] (role {message['role']!r}); take the "
                "message out, or choose a chat template that writes it (--chat-template)"
            )
    return text


def _is_left_out(
    tokenizer: Tokenizer, messages: Sequence[Message], index: int, text: str, options: Mapping[str, Any]
) -> bool:
    """Whether a message might say anything else, and the text would be the same.

    Its words need not stand there as they are: some are written as JSON, or lose a switch such as /no_think.
    """
    message = messages[index]
    content, role = message.get("content"), message["role"]
    # What an assistant thought before is left out on purpose.
    if role == "assistant" or not isinstance(content, str) or not content.strip():
        return False
    if role in HEARD and content.strip() in text:
        return False
    others = [*messages[:index], {**message, "content": f"{content}?"}, *messages[index + 1 :]]
    try:
        return tokenizer.apply_chat_template(others, **options) == text
    except ValueError:
        return False
