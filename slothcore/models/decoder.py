"""The one decoder-only transformer; families differ in their `DecoderConfig` alone.

T  tokens, packed    H  hidden_size    V  vocab_size    N  tokens that have a target
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slothcore.autograd.cross_entropy import linear_cross_entropy
from slothcore.layers.linear import Linear
from slothcore.layers.moe import load_balancing_loss
from slothcore.layers.packed import PackedInputs, pack_inputs
from slothcore.models.config import DecoderConfig
from slothcore.models.decoder_body import DecoderBody, GradientCheckpointing
from slothcore.models.generation import Generates
from slothcore.models.graphs import StepGraphs


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
        folder: where its weights were read; None for random ones.
        lora_config: the `slothcore.lora` configuration of its adapter; None without one.
        taken_out: path of each layer whose base weight W is W - scaling * B A by now -> A and B; see `base_change`.
        vocabulary_changed: whether rows of the embedding and the head are others than the base model's, so that an
            adapter has to bring them along; see `models/vocabulary.py`.
        new_token_ids: the tokens that have been added since it was loaded.
        graphs: what replays short training passes, after `enable_graphs`; else None.
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
        self.graphs: StepGraphs | None = None
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
    def gradient_checkpointing(self) -> GradientCheckpointing:
        """What a training pass does not keep on the device for its backward pass; see `DecoderBody`.

        Raises: ValueError when it is set to anything but False, True, "mlp" or "offload".
        """
        return self.model.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, mode: GradientCheckpointing) -> None:
        self.model.gradient_checkpointing = mode

    @property
    def neftune_noise_alpha(self) -> float | None:
        """NEFTune's alpha: noise on the embeddings of passes in training mode with gradients enabled; None: none."""
        return self.model.neftune_noise_alpha

    @neftune_noise_alpha.setter
    def neftune_noise_alpha(self, alpha: float | None) -> None:
        self.model.neftune_noise_alpha = alpha

    def enable_graphs(self, max_tokens: int = 2048) -> StepGraphs:
        """Replay training passes of at most `max_tokens` tokens as CUDA graphs: two launches instead of thousands.

        A training pass is a call with labels, on host tensors, in training mode with gradients enabled; its
        `loss.backward()` is replayed too. It is padded to one of a few sizes, of which each is captured when it comes
        the second time. Whatever cannot be replayed runs as before: `graphs.why_not` lists it. What is computed depends
        on the inputs alone, not on what was captured before, but padding and thus enabling this changes last bits.
        Set `graphs.expected_tokens` to the longest pass to come, if it is known: that saves captures.

        The adapter's parameters are laid end to end (`graphs.flat`), and so are their gradients. A gradient is valid
        until the next backward pass that finds it None; `torch.autograd.grad` with respect to a parameter, and hooks on
        parameters or layers, are not served by a replay.

        Returns: `model.graphs`.
        Raises: ValueError if max_tokens is not positive.
        """
        self.graphs = StepGraphs(self.model, self.config, max_tokens=max_tokens)
        return self.graphs

    def disable_graphs(self) -> None:
        """Run every pass as before, and give the memory of the graphs back."""
        self.graphs = None

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
        inputs = pack_inputs(
            input_ids,
            labels=labels,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            vocab_size=self.config.vocab_size,
        )
        num_targets = 0 if inputs.targets is None else len(inputs.targets)
        if inputs.targets is not None and num_targets == 0 and num_items is None:
            raise ValueError("labels have no target: all are -100, or the first token of their document")
        router_logits: list[Tensor] = []
        hidden, inputs = self._hidden_states(inputs, router_logits)
        if inputs.targets is None or inputs.rows is None:
            return DecoderOutput(loss=None, logits=inputs.restore(self.logits(hidden)), num_targets=0)
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

    def _hidden_states(self, inputs: PackedInputs, router_logits: list[Tensor]) -> tuple[Tensor, PackedInputs]:
        """Those of the pass [T, H], with its inputs on this device; a replayed pass has rows of padding at the end."""
        replayed = None if self.graphs is None else self.graphs.hidden_states(inputs)
        if replayed is not None:
            return replayed
        inputs = inputs.to(self.device)
        hidden = self.model(inputs.input_ids, inputs.position_ids, inputs.documents, router_logits=router_logits)
        return hidden, inputs

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
