"""The one decoder-only transformer; families differ in their `DecoderConfig` alone.

T  tokens, packed    H  hidden_size    V  vocab_size    N  tokens that have a target
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from slothcore.autograd.cross_entropy import linear_cross_entropy
from slothcore.layers.moe import load_balancing_loss
from slothcore.layers.packed import PackedInputs, pack_inputs
from slothcore.models.decoder_body import GradientCheckpointing
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


class Decoder(Generates):
    """A decoder-only language model with Hugging Face's module and weight names, which learns and writes.

    Attributes:
        graphs: what replays short training passes, after `enable_graphs`; else None.
        (others): see `LanguageModel`.
    """

    graphs: StepGraphs | None = None

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
        auxiliary_loss: bool = True,
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
            auxiliary_loss: add what the configuration has for the use of experts; an evaluation does not.
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
        if router_logits and auxiliary_loss:
            loss = loss + self._auxiliary_loss(router_logits) * (num_targets / num_items)
        return DecoderOutput(loss=loss, logits=None, num_targets=num_targets)

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
