"""The chat template in a GGUF file, for tokenizers with a space at the very beginning of a text only.

llama.cpp's key "add_space_prefix" puts a space before the first word and before each text behind a special token. Older
tokenizers do the same ("legacy"); newer ones of that kind, such as Mistral's since v0.3, have the first space alone
(`prepend_scheme` first), and their templates write `[INST] `, with the other one. With the key llama.cpp reads two
spaces there; without it a plain text lacks its first. So the key is set, and the template leaves out the one space
behind a special token that llama.cpp puts there again: plain texts and conversations have the tokenizer's own ids.
"""

import json
import re
from collections.abc import Iterable, Sequence

from slothcore.data.tokenizer import Tokenizer
from slothcore.export.go_template import SYSTEM, marked_conversation


def has_space_at_beginning_only(tokenizer: Tokenizer) -> bool:
    """Whether this is such a tokenizer."""
    return (json.loads(tokenizer.to_json())["pre_tokenizer"] or {}).get("prepend_scheme") == "first"


def template_without_spaces(tokenizer: Tokenizer) -> str | None:
    """The chat template without the space behind each special token that it writes.

    Returns: None if the template also writes a text without a space behind one of them, which llama.cpp cannot read.
    """
    template = tokenizer.chat_template
    assert template is not None
    # What llama.cpp finds in a text before all others.
    added = [token["content"] for token in json.loads(tokenizer.to_json())["added_tokens"]]
    samples = list(_samples(tokenizer))
    if not all(_has_spaces(text, added) for text in samples):
        return None
    written = [token for token in added if any(token in text for text in (template, *samples))]
    # What is done for a token is done for all that end with it.
    written = [token for token in written if not any(token != other and token.endswith(other) for other in written)]
    if not written:
        return template
    # A method and a filter that every reader of templates has: llama.cpp's own of any age, and jinja2.
    steps = (f"whole_text.split({_quoted(f'{token} ')}) | join({_quoted(token)})" for token in written)
    return (
        f"{{% set whole_text %}}{_as_block(template)}{{% endset %}}"
        + "".join(f"{{% set whole_text = {step} %}}" for step in steps)
        + "{{ whole_text }}"
    )


def _as_block(template: str) -> str:
    """What writes within a block what the template writes by itself.

    Readers leave out one line's end behind a block and at the very end, and spaces before a block that begins a line.
    """
    body = re.sub(r"(\r\n|\r|\n)\Z", "", template)
    begin = "\n" if body[:1].isspace() else ""  # left out behind the block, so that what follows begins a line
    end = "{{ '' }}" if re.search(r"(\A|[\r\n])[ \t]*\Z", body) else ""  # so that the block's end begins none
    return f"{begin}{body}{end}"


def _has_spaces(text: str, added: Sequence[str]) -> bool:
    """Whether whatever stands behind a token is nothing, another token, or a space with more behind it."""
    token = "|".join(re.escape(each) for each in sorted(added, key=len, reverse=True))
    behind = re.compile(rf"\Z|{token}| (?!\Z|{token})")
    return all(behind.match(text, found.end()) for found in re.finditer(token, text))


def _samples(tokenizer: Tokenizer) -> Iterable[str]:
    """Conversations as the template writes them, as far as it takes them."""
    for messages in (marked_conversation(), marked_conversation(SYSTEM)):
        for count in range(1, len(messages) + 1):
            try:
                yield tokenizer.apply_chat_template(messages[:count], add_generation_prompt=True)
            except ValueError:
                continue


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
