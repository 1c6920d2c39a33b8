"""A tokenizer as metadata of a GGUF file, so that llama.cpp gives the same ids.

llama.cpp has two ways to make pieces of a text that models of today use. "gpt2" cuts it into words by a pattern, which
has a name there, and applies merges to their bytes in the order of the list. "llama" is SentencePiece's BPE: it joins
neighbours whose joint piece has the highest score, and spells what no piece covers in bytes. A `tokenizer.json` of the
second kind lists merges as well, in the order of those scores: the place of a piece's first merge is minus its score.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence, Set
from typing import Any

from slothcore.data.chat_rows import turn_end
from slothcore.data.tokenizer import Tokenizer
from slothcore.export.gguf_file import Value
from slothcore.export.gguf_template import has_space_at_beginning_only, template_without_spaces

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"
ENGLISH = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD = r"[^\r\n\p{L}\p{N}]?"
LLAMA3 = rf"{ENGLISH}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = rf"{WORD}{UPPER}*{LOWER}+|{WORD}{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
GPT4O = (
    rf"{WORD}{UPPER}*{LOWER}+{ENGLISH}?|{WORD}{UPPER}+{LOWER}*{ENGLISH}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)
# How words are cut, and whether a word that is in the vocabulary is taken whole -> the name in llama.cpp.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((f"Split {LLAMA3}",), True): "llama-bpe",
    ((f"Split {LLAMA3}",), False): "dbrx",
    ((f"Split {QWEN2}",), False): "qwen2",
    ((f"Split {TEKKEN}",), True): "tekken",
    ((f"Split {GPT4O}",), False): "gpt-4o",
    (("ByteLevel words",), False): "gpt-2",
    (("Digits", "ByteLevel words"), False): "smollm",
}


def metadata(tokenizer: Tokenizer | None, vocab_size: int, *, other_ends: tuple[int, ...] = ()) -> dict[str, Value]:
    """The keys `tokenizer.*`.

    Args:
        tokenizer: None: the file is for callers who give token ids themselves.
        vocab_size: rows of the embedding; ids that the tokenizer has not get names that no token has.
        other_ends: tokens that end a text beside the tokenizer's own.
    Raises: ValueError if llama.cpp has no tokenizer that gives the same ids.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    source = json.loads(tokenizer.to_json())
    model = source["model"]
    kind, pre = _kind(source)
    texts, types = _names(source, vocab_size, has_bytes=kind == "llama")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    values: dict[str, Value] = {"model": kind, "pre": pre, "tokens": texts, "token_type": types}
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None and unknown < vocab_size:
        types[unknown] = UNKNOWN
        values["unknown_token_id"] = unknown
    if kind == "llama":
        ranks = _ranks(merges, model["vocab"].keys() - {token["content"] for token in source["added_tokens"]})
        values["scores"] = [-float(ranks.get(text, 0)) for text in texts]
        values["add_space_prefix"] = _puts_space_first(source)
    else:
        # It does not load a file without any, and these two are no pieces.
        values["merges"] = [" ".join(merge) for merge in merges or [("<none>", "<none>")]]
    greedy = [t["content"] for t in source["added_tokens"] if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if greedy and not has_phi3_tokens(tokenizer):
        warnings.warn(
            f"llama.cpp finds a token such as {greedy[0]!r} wherever it stands and leaves the spaces beside it, and "
            "this tokenizer does not; ids there will differ",
            stacklevel=2,
        )
    values |= _special_ids(tokenizer, vocab_size, other_ends)
    keys = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    template = _chat_template(tokenizer)
    return keys | ({"tokenizer.chat_template": template} if template else {})


def _chat_template(tokenizer: Tokenizer) -> str | None:
    """The one that makes llama.cpp read a conversation as the tokenizer does, as far as there is one."""
    if not tokenizer.chat_template or not has_space_at_beginning_only(tokenizer):
        return tokenizer.chat_template
    template = template_without_spaces(tokenizer)
    if template is None:
        warnings.warn(
            "llama.cpp reads a text behind a special token as if one more space began it, and this tokenizer only at "
            "the very beginning; in conversations some ids there will differ by that space",
            stacklevel=3,
        )
    return template or tokenizer.chat_template


def has_phi3_tokens(tokenizer: Tokenizer) -> bool:
    """Whether special tokens swallow the space behind them, and are those that llama.cpp looks for then."""
    added = {token["content"]: token["rstrip"] for token in json.loads(tokenizer.to_json())["added_tokens"]}
    return any(added.values()) and added.keys() >= {"<unk>", "<s>", "</s>", "<|endoftext|>"}


def _names(source: Mapping[str, Any], vocab_size: int, *, has_bytes: bool) -> tuple[list[str], list[int]]:
    """The text of each id, and its type."""
    found: dict[int, tuple[str, int]] = {}
    for text, index in source["model"]["vocab"].items():
        found[index] = text, BYTE if has_bytes and BYTE_TOKEN.fullmatch(text) else NORMAL
    for token in source["added_tokens"]:
        found[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    taken = {text for text, _ in found.values()}
    for index in set(range(vocab_size)) - found.keys():
        name = f"[PAD{index}]"
        while name in taken:  # llama.cpp ends where two tokens have one text
            name = f"[{name}]"
        found[index] = name, UNUSED
    texts, types = zip(*(found[index] for index in range(vocab_size)), strict=True)
    return list(texts), list(types)


def _special_ids(tokenizer: Tokenizer, vocab_size: int, other_ends: tuple[int, ...]) -> dict[str, Value]:
    sample = tokenizer.encode("a")
    values: dict[str, Value] = {
        "add_bos_token": tokenizer.bos_token_id is not None and sample[:1] == [tokenizer.bos_token_id],
        "add_eos_token": tokenizer.eos_token_id is not None and sample[-1:] == [tokenizer.eos_token_id],
    }
    for name, token_id in (
        ("bos_token_id", tokenizer.bos_token_id),
        ("eos_token_id", tokenizer.eos_token_id),
        ("padding_token_id", tokenizer.pad_token_id),
    ):
        if token_id is not None and token_id < vocab_size:
            values[name] = token_id
    # It ends a text at any of three tokens; the names say what for, and it treats them alike.
    end_of_turn = turn_end(tokenizer)
    ends = dict.fromkeys((*((end_of_turn,) if isinstance(end_of_turn, int) else ()), *other_ends))
    ends.pop(tokenizer.eos_token_id, None)
    return values | dict(zip(("eot_token_id", "eom_token_id"), ends, strict=False))


def _kind(source: Mapping[str, Any]) -> tuple[str, str]:
    """llama.cpp's name of the way, and of its pattern for words. Raises: ValueError if it has none that is the same."""
    model = source["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"a GGUF file needs a tokenizer of the type BPE, got {model['type']}; export it with the format merged"
        )
    if SPACE in json.dumps([source["normalizer"], source["pre_tokenizer"]], ensure_ascii=False):
        if not model.get("byte_fallback"):
            warnings.warn(
                "this tokenizer has no tokens for single bytes: llama.cpp refuses texts with characters that it lacks",
                stacklevel=3,
            )
        return "llama", "default"
    steps = source["pre_tokenizer"] or {}
    cuts = tuple(filter(None, map(_cut, steps.get("pretokenizers", [steps]))))
    if not cuts and not model["merges"]:
        cuts = ("ByteLevel words",)  # where every byte is a piece, it is the same however words are cut
    pre = PRE_TOKENIZERS.get((cuts, bool(model.get("ignore_merges"))))
    if pre is None or (source["normalizer"] or {}).get("type") not in (None, "NFC"):
        raise ValueError(
            "llama.cpp has no tokenizer that cuts text into words as this one does (pre_tokenizer of tokenizer.json); "
            "export it with the format merged"
        )
    return "gpt2", pre


def _cut(step: Mapping[str, Any]) -> str | None:
    """One step of a pre-tokenizer, as `PRE_TOKENIZERS` names it; None if it cuts nothing."""
    match step:
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return f"Split {regex}"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": uses_regex}:
            return "ByteLevel words" if uses_regex else None
        case {"type": "Digits", "individual_digits": True}:
            return "Digits"
    return f"unknown {step.get('type')}"


def _ranks(merges: Sequence[tuple[str, ...]], pieces: Set[str]) -> dict[str, int]:
    """The place of each piece's first merge.

    Raises: ValueError if a piece lacks a merge of two others: llama.cpp joins all that are a piece together.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    known = set(merges)
    for piece in pieces:
        halves = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if any(left in pieces and right in pieces and (left, right) not in known for left, right in halves):
            raise ValueError(
                f"llama.cpp would join pieces that this tokenizer does not join, such as those of {piece!r}; "
                "export it with the format merged"
            )
    return ranks


def _puts_space_first(source: Mapping[str, Any]) -> bool:
    """Whether a text is read as if it began with a space."""
    normalizer = source["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    pre_tokenizer = source["pre_tokenizer"] or {}
    return any(step.get("type") == "Prepend" for step in steps) or (
        pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") != "never"
    )
