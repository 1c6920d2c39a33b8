"""The one decoder-only transformer; families differ in their `DecoderConfig` alone.

T  tokens, packed    H  hidden_size    V  vocab_size    N  tokens that have a target
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slothcore.autograd.cross_entropy import linear_cross_entropy
from slothcore.layers.kv_cache import KvCache
from slothcore.layers.linear import Linear
from slothcore.layers.moe import load_balancing_loss
from slothcore.layers.packed import Documents, PackedInputs, pack_inputs
from slothcore.layers.rope import RotaryEmbedding
from slothcore.models.config import DecoderConfig
from slothcore.models.decoder_layer import DecoderLayer, make_norm
from slothcore.models.generation import Generates


@dataclass(frozen=True)
class DecoderOutput:
    """What a forward pass gives: with labels the loss, without them the logits.

    Attributes:
        loss: 0-dim float32, or None.
        logits: [B, S, V] or [T, V] as the input was shaped, zeros at padding; or None.
        num_targets: how many tokens had a target; 0 without labels.
    """

    loss: Tensor | None
    logits: Tensor | None
    num_targets: int


class DecoderBody(nn.Module):
    """Embedding, layers and the final norm: token ids to hidden states."""

    def __init__(self, config: DecoderConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device),
            freeze=False,
            # As in transformers, a real token with this id gives no gradient. Some files say -1 for "none".
            padding_idx=None if (config.pad_token_id or 0) < 0 else config.pad_token_id,
        )
        # HF rounds the scale to the weight dtype (55.43 -> 55.5 in bfloat16); a 0-dim CPU tensor multiplies anywhere.
        scale = config.embedding_scale
        self.embedding_scale: Tensor | None = None
        if scale != 1.0:
            self.embedding_scale = torch.tensor(scale, dtype=dtype, device="cpu")
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, dtype=dtype, device=device) for i in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config, config.hidden_size, dtype=dtype, device=device)
        self.rotary_emb = RotaryEmbedding(config.rope, config.head_dim)
        self.rotary_emb_local: RotaryEmbedding | None = None
        if config.local_rope is not None:
            self.rotary_emb_local = RotaryEmbedding(config.local_rope, config.head_dim)
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        documents: Documents,
        cache: KvCache | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [T, H] after the final norm, for input_ids and position_ids [T].

        `router_logits` is filled with those of the sparse layers, if they keep them.
        """
        # A token that continues a cached row has its document in the cache, not in this pass.
        boundaries = documents.cu_seqlens if cache is None or cache.is_prompt else None
        angles = local_angles = self.rotary_emb(position_ids, boundaries)
        if self.rotary_emb_local is not None:
            local_angles = self.rotary_emb_local(position_ids, boundaries)
        branch: Tensor = self.embed_tokens(input_ids)
        if self.embedding_scale is not None:
            branch = branch * self.embedding_scale
        residual: Tensor | None = None
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            inputs = branch, residual, local_angles if layer.is_local else angles, documents
            if self.gradient_checkpointing and torch.is_grad_enabled():
                branch, residual, routed = checkpoint(
                    layer, *inputs, use_reentrant=False, preserve_rng_state=layer.draws_random_numbers()
                )
            else:
                branch, residual, routed = layer(*inputs, None if cache is None else cache.layer(index))
            if routed is not None and router_logits is not None:
                router_logits.append(routed)
        return self.norm(branch, residual)[0]


class Decoder(Generates, nn.Module):
    """A decoder-only language model with Hugging Face's module and weight names.

    Attributes:
        config: the switches it was built from.
        hf_config: the `config.json` it came from, kept whole for export.
        generation_config: the `generation_config.json` beside it; empty if there is none.
        bits: 4 (NF4 linears), 16 or 32: how the weights of the layers are stored.
        dtype: in which it computes.
        max_seq_length: the longest document it is meant for.
        name_or_path: what it was loaded as, which an adapter names as its base; None for random weights.
        revision: branch, tag or commit of that on the Hub, if one was asked for.
        lora_config: the `slothcore.lora` configuration of its adapter; None without one.
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
        self.lora_config: Any = None
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
        """Tokens that end a text: those of generation_config.json, else of config.json."""
        eos = self.generation_config.get("eos_token_id", self.config.eos_token_ids)
        return (eos,) if isinstance(eos, int) else tuple(eos or ())

    @property
    def gradient_checkpointing(self) -> bool:
        """Keep only the input of each layer for the backward pass, and run the layer again there."""
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.model.gradient_checkpointing = enabled

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> DecoderOutput:
        """Loss (with labels) or logits of a padded batch or of packed documents.

        Tensors on the CPU are best also for a model on a GPU: what depends on their values is then worked out without
        waiting for the GPU.

        Args:
            input_ids: [B, S], or packed [T].
            labels: the same shape, not shifted, -100 at tokens that are no target. The first token of a document
                never is one.
            attention_mask: [B, S], zero at padding on the left or right of a row.
            position_ids: the same shape as input_ids; default: counted from 0 in each document.
            cu_seqlens: [documents + 1], boundaries in a packed [T]; default: one document.
            num_items: the loss is the sum over targets divided by this; default: their number, so the mean.
        Raises: ValueError for shapes that do not fit, ids outside the vocabulary, or labels without any target when
            num_items is not given.
        """
        inputs = self.pack(
            input_ids,
            labels=labels,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
        )
        router_logits: list[Tensor] = []
        hidden = self.model(inputs.input_ids, inputs.position_ids, inputs.documents, router_logits=router_logits)
        if inputs.targets is None or inputs.rows is None:
            return DecoderOutput(loss=None, logits=inputs.restore(self.logits(hidden)), num_targets=0)
        num_targets = len(inputs.targets)
        if num_targets == 0 and num_items is None:
            raise ValueError("labels have no target: all are -100, or the first token of their document")
        num_items = num_targets if num_items is None else num_items
        loss = self.loss(hidden, inputs.targets, inputs.rows, num_items=num_items)
        if router_logits:
            loss = loss + self._auxiliary_loss(router_logits) * (num_targets / num_items)
        return DecoderOutput(loss=loss, logits=None, num_targets=num_targets)

    def pack(self, input_ids: Tensor, **others: Tensor | None) -> PackedInputs:
        """The packed token stream of a forward pass on this model's device; see `pack_inputs`."""
        return pack_inputs(input_ids, **others, vocab_size=self.config.vocab_size, device=self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [..., V], for hidden states [..., H]."""
        logits = self.lm_head(hidden)
        softcap = self.config.logit_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def loss(self, hidden: Tensor, targets: Tensor, rows: Tensor, *, num_items: Tensor | float) -> Tensor:
        """Sum over `targets` [N] of their cross-entropy at `rows` [N] of `hidden` [T, H], over num_items."""
        if self.lm_head.lora_A is not None:
            # The chunked loss reads one plain weight; a head with an adapter has more than that.
            logits = self.logits(hidden[rows]).float()
            return F.cross_entropy(logits, targets, reduction="sum") / num_items
        return linear_cross_entropy(
            hidden, self.lm_head.weight, targets, rows, num_items=num_items, softcap=self.config.logit_softcap
        )

    def _auxiliary_loss(self, router_logits: list[Tensor]) -> Tensor:
        """What the configuration adds to a mean loss so that the experts are used evenly."""
        moe = self.config.moe
        assert moe is not None
        return moe.aux_loss_coef * load_balancing_loss(router_logits, experts_per_token=moe.experts_per_token)


def _omit_tied_head(model: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    """Hugging Face writes a tied weight once, under the embedding's name."""
    assert isinstance(model, Decoder)
    if model.has_tied_head:
        del state[f"{prefix}lm_head.weight"]


def _supply_tied_head(model: nn.Module, state: dict[str, Any], prefix: str, *unused: object) -> None:
    """The other half: a strict load must not miss the weight that was left out."""
    assert isinstance(model, Decoder)
    if model.has_tied_head and f"{prefix}model.embed_tokens.weight" in state:
        state.setdefault(f"{prefix}lm_head.weight", state[f"{prefix}model.embed_tokens.weight"])
