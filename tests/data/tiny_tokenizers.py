"""Tokenizer folders small enough to be made in a test."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as TokenizerCore

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3: the template itself writes the begin token.
CHATML_WITH_BEGIN = "{{ bos_token }}" + CHATML
# As Phi-3: something closes the last message only.
CHATML_WITH_CLOSING = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
# As Qwen3: what an assistant thought is dropped once the user goes on.
CHATML_THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if loop.last %}{{ message.content }}{% else %}{{ message.content.split('</think>')[-1] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As templates that tell themselves what the assistant says.
MARKED = CHATML.replace(
    "{{ message.content }}<|im_end|>\n",
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n",
)
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")


def write_byte_tokenizer(
    folder: Path, *, add_bos: bool = True, add_eos: bool = False, config: dict | None = None
) -> Path:
    """A byte-level tokenizer: 5 special tokens, then one token a byte and a few merges; ids 1 and 2 begin and end."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    merges = [("a", "n"), ("t", "h"), ("th", "e"), (":", "Ġ")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    core = TokenizerCore(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if add_bos or add_eos:
        template = f"{'<s> ' * add_bos}$A{' </s>' * add_eos}"
        core.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1)] * add_bos + [("</s>", 2)] * add_eos
        )
    return _write(folder, core, {"bos_token": "<s>", "eos_token": "</s>", **(config or {})})


def write_sentencepiece_tokenizer(folder: Path) -> Path:
    """A tokenizer that puts a space before each text, as Llama 2's does."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3}
    for symbol in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:?.\n":
        vocabulary[symbol] = len(vocabulary)
    core = TokenizerCore(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _write(folder, core, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def _write(folder: Path, core: TokenizerCore, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
