"""Tiny models of every family as llama.cpp can compute them, and tokenizers of both kinds that it has."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as TokenizerCore

from slothcore.data.tokenizer import Tokenizer
from slothcore.lora.attach import add_lora
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from tests.data.tiny_tokenizers import CHATML, _write
from tests.lora.reference import randomise_zero_factors
from tests.models.tiny import LLAMA3_ROPE
from tests.models.zoo import FAMILIES_TINY, LONGROPE_SIZES, YARN, Variant, longrope, rope, saved, tiny_model

VOCAB_SIZE = 320
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CUTS = {
    "Digits": pre_tokenizers.Digits(individual_digits=True),
    "ByteLevel words": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}
WORDS = ("th", "the", "in", "er", "an", "and", "ing", "on", "re", "ed", "is", "it", "at", "en", "or", "es", "to", "he")


@dataclass(frozen=True)
class Case:
    """A variant of the zoo, changed where llama.cpp has no such switch.

    Attributes:
        base: the zoo's.
        changes: its keywords that are others.
        lengths: of texts that both compute alike: a window that llama.cpp ignores bounds them, and that it chooses
            longrope's factors by the size of its cache, here 256, means texts beyond the original length.
    """

    base: Variant
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 5, 40, 90)

    @property
    def variant(self) -> Variant:
        tied = {"tie_word_embeddings": True} if self.base.family.startswith("gemma") else {}
        return replace(self.base, options={**self.base.options, "vocab_size": VOCAB_SIZE, **tied, **self.changes})

    def __str__(self) -> str:
        return f"{self.base.family}-{self.name}"


def _of(family: str, index: int = 0) -> Variant:
    return FAMILIES_TINY[family][index]


ALL_SPARSE = {"mlp_only_layers": [], "norm_topk_prob": True}
NO_WINDOW = {"sliding_window": None}
CASES = [
    Case(_of("llama"), "grouped-queries"),
    Case(_of("llama"), "llama3-rope", {"rope_parameters": LLAMA3_ROPE}),
    Case(_of("llama"), "linear-rope", rope("linear", factor=2.5)),
    Case(_of("llama"), "longrope", {**LONGROPE_SIZES, "rope_parameters": longrope(4)}, lengths=(40, 90)),
    Case(_of("llama"), "biases", {"attention_bias": True, "mlp_bias": True}),
    Case(_of("llama"), "tied-head", {"tie_word_embeddings": True}),
    Case(_of("llama", 3), "dynamic-rope", lengths=(5, 30)),
    Case(_of("mistral"), "window", lengths=(3, 7)),
    Case(_of("mistral", 1), "wide-heads"),
    Case(_of("mistral", 2), "yarn-rope"),
    Case(_of("mistral", 2), "yarn-attention", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    Case(_of("mixtral"), "experts", NO_WINDOW),
    Case(_of("mixtral", 1), "three-of-five"),
    Case(_of("qwen2"), "tied-head"),
    Case(_of("qwen2", 2), "yarn-rope"),
    Case(_of("qwen3"), "head-norms"),
    Case(_of("qwen3", 2), "tied-yarn-rope"),
    Case(_of("qwen3_moe"), "all-sparse", ALL_SPARSE),
    Case(_of("gemma"), "one-key-head"),
    Case(_of("gemma2"), "windows-and-caps"),
    Case(_of("gemma2"), "no-caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    Case(_of("gemma2"), "no-windows", {"layer_types": ["full_attention"] * 3}),
    Case(_of("gemma3_text"), "local-and-global"),
    Case(_of("gemma3_text"), "own-head", {"tie_word_embeddings": False}),
    Case(_of("gemma3_text", 1), "default-pattern"),
    Case(_of("gemma3"), "text-of-multimodal"),
    Case(_of("phi3"), "window", lengths=(3, 7)),
    Case(_of("phi3", 1), "longrope", lengths=(40, 90)),
    Case(_of("phi3", 2), "partial-longrope", lengths=(40, 90)),
]
FAMILIES = {case.base.family: case for case in reversed(CASES)}
"""The first case of each family."""


def load_case(case: Case, folder: Path, *, bits: int = 32) -> Decoder:
    """The model of a case, which transformers made and saved."""
    folder.mkdir(parents=True, exist_ok=True)
    saved(tiny_model(case.variant), folder)
    return load_model(folder, bits=bits, device="cpu", progress=False)


def adapted(model: Decoder, **options: Any) -> Decoder:
    """The model with an adapter that has moved."""
    add_lora(model, **{"r": 4, "lora_alpha": 8, **options})
    randomise_zero_factors(model)
    return model


def sentencepiece_tokenizer(folder: Path, *, space_first: bool = True) -> Tokenizer:
    """The kind of Llama 2: merges, single ASCII bytes for what they do not cover, and a space before each text.

    Gemma's puts no space there.

    Without the bytes above ASCII no token is a part of a character, which llama.cpp's server would keep back.
    """
    vocabulary = {token: index for index, token in enumerate(SPECIAL)}
    for byte in range(128):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for symbol in ("▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,'"):
        vocabulary[symbol] = len(vocabulary)
    merges = _merges(vocabulary, (*WORDS, *(f"▁{word}" for word in WORDS)))
    _fill(vocabulary)
    core = TokenizerCore(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Replace(" ", "▁")
    if space_first:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), core.normalizer])
    else:
        core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(folder, core, {"unk_token": "<unk>"})


def byte_level_tokenizer(
    folder: Path, *, steps: Sequence[str] = ("ByteLevel words",), whole: bool = False
) -> Tokenizer:
    """The kind of GPT-2: words by a pattern, and merges of their bytes.

    Args:
        steps: how words are cut, as `PRE_TOKENIZERS` names it.
        whole: whether a word that is in the vocabulary is taken whole; there are two that no merge makes.
    """
    vocabulary = {token: index for index, token in enumerate(SPECIAL)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    merges = _merges(vocabulary, (*WORDS, *(f"Ġ{word}" for word in WORDS)))
    if whole:
        vocabulary |= {"lighthouse": len(vocabulary), "Ġferry": len(vocabulary) + 1}
    core = TokenizerCore(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(
                CUTS[step] if step in CUTS else pre_tokenizers.Split(Regex(step.removeprefix("Split ")), "isolated")
                for step in steps
            ),
            *(
                []
                if "ByteLevel words" in steps
                else [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            ),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return _finished(folder, core, {})


def _merges(vocabulary: dict[str, int], pieces: tuple[str, ...]) -> list[tuple[str, str]]:
    """All merges of two pieces that make another, by the others' order; the pieces are added to the vocabulary."""
    added = dict.fromkeys(piece[:end] for piece in pieces for end in range(2, len(piece) + 1))
    for piece in added:
        vocabulary[piece] = len(vocabulary)
    halves = ((piece[:cut], piece[cut:]) for piece in added for cut in range(1, len(piece)))
    return [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]


def _fill(vocabulary: dict[str, int]) -> None:
    """Up to the rows of the models' embeddings, with pieces that no merge makes."""
    while len(vocabulary) < VOCAB_SIZE:
        vocabulary[f"<extra {len(vocabulary)}>"] = len(vocabulary)


def _finished(folder: Path, core: TokenizerCore, config: dict[str, Any]) -> Tokenizer:
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML, **config}
    return Tokenizer.from_folder(_write(folder, core, config))
