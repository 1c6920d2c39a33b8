"""What every use of the one decoder has: its weights, where it came from, and the way from hidden states to scores.

T  tokens, packed    H  hidden_size    V  vocab_size
"""

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from slothcore.layers.linear import Linear
from slothcore.layers.packed import PackedInputs, pack_inputs
from slothcore.models.config import DecoderConfig
from slothcore.models.decoder_body import DecoderBody

Model = TypeVar("Model", bound="LanguageModel")


class LanguageModel(nn.Module):
    """Body and head of a decoder-only language model, with Hugging Face's module and weight names.

    Attributes:
        config: the switches it was built from.
        hf_config: the `config.json` it came from, kept whole for export.
        generation_config: the `generation_config.json` beside it; empty if there is none.
        bits: 4 (NF4 linears), 16 or 32: how the weights of the layers are stored.
        dtype: in which it computes.
        max_seq_length: the longest document it is meant for.
        name_or_path: what it was loaded as, which an adapter names as its base; None for random weights.
        revision: branch, tag or commit of that on the Hub, if one was asked for.
        folder: where its weights were read; None for random ones.
        lora_config: the `slothcore.lora` configuration of its adapter; None without one.
        taken_out: path of each layer whose base weight W is W - scaling * B A by now -> A and B; see `base_change`.
        vocabulary_changed: whether rows of the embedding and the head are others than the base model's, so that an
            adapter has to bring them along; see `models/vocabulary.py`.
        new_token_ids: the tokens that have been added since it was loaded.
        times_in_training: how often it was put into training mode, so that who keeps what it computed can tell that it
            may have learned since, also from what writes to weights without torch's knowing.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        bits: int | None = None,
        hf_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.hf_config = hf_config or {}
        self.generation_config: dict[str, Any] = {}
        self.name_or_path: str | None = None
        self.revision: str | None = None
        self.folder: Path | None = None
        self.lora_config: Any = None
        self.taken_out: dict[str, tuple[Tensor, Tensor]] = {}
        self.vocabulary_changed = False
        self.new_token_ids: tuple[int, ...] = ()
        self.times_in_training = 0
        self.dtype = dtype
        self.bits = bits if bits is not None else torch.finfo(dtype).bits
        self.max_seq_length = config.longest_document
        self.model = DecoderBody(config, dtype=dtype, device=device)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, device=device)
        self.tie_weights()
        self.register_state_dict_post_hook(_omit_tied_head)
        self.register_load_state_dict_pre_hook(_supply_tied_head)

    def tie_weights(self) -> None:
        """Make the head use the embedding's weight, if the configuration ties them; no second copy exists then."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def has_tied_head(self) -> bool:
        """Whether the head is the embedding's weight at this moment."""
        return self.lm_head.weight is self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.embed_tokens.weight.device

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: those of generation_config.json, else of config.json.

        Raises: ValueError if what stands there is none.
        """
        eos = self.generation_config.get("eos_token_id", self.config.eos_token_ids)
        ids = tuple(eos or ()) if eos is None or isinstance(eos, list | tuple) else (eos,)
        if not all(isinstance(token, int) for token in ids):
            raise ValueError(
                f"generation_config.json: eos_token_id must be a token id or a list of them, got {eos!r}; correct it "
                "there, or take the entry out"
            )
        return ids

    def train(self: Model, mode: bool = True) -> Model:
        """Put it into training mode, or with False into that of evaluation; see `nn.Module.train`."""
        super().train(mode)
        self.times_in_training += mode
        return self

    def pack(self, input_ids: Tensor, **others: Tensor | None) -> PackedInputs:
        """The packed token stream of a forward pass on this model's device; see `pack_inputs`."""
        return pack_inputs(input_ids, **others, vocab_size=self.config.vocab_size, device=self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [..., V], for hidden states [..., H]."""
        logits = self.lm_head(hidden)
        softcap = self.config.logit_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _omit_tied_head(model: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """Hugging Face writes a tied weight once, under the embedding's name."""
    assert isinstance(model, LanguageModel)
    if model.has_tied_head:
        del state[f"{prefix}lm_head.weight"]


def _supply_tied_head(model: nn.Module, state: dict[str, Any], prefix: str, *unused: object) -> None:
    """The other half: a strict load must not miss the weight that was left out."""
    assert isinstance(model, LanguageModel)
    if model.has_tied_head and f"{prefix}model.embed_tokens.weight" in state:
        state.setdefault(f"{prefix}lm_head.weight", state[f"{prefix}model.embed_tokens.weight"])
