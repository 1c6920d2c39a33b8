"""One block of the decoder: attention and a feed-forward branch on the residual stream.

A block hands on its last branch and the residual stream apart, (branch, residual), so that the add between them is
done by the norm that follows.

    T  tokens, packed    H  hidden_size    E  experts    P  rotated channels of a head
"""

from functools import partial

import torch
from torch import Tensor, nn

from slothcore.layers.attention import SelfAttention
from slothcore.layers.experts import ExpertLinear
from slothcore.layers.layer_cache import LayerCache
from slothcore.layers.linear import Linear
from slothcore.layers.mlp import GatedMlp
from slothcore.layers.moe import SparseMoe
from slothcore.layers.norm import RMSNorm, norm_add_norm
from slothcore.layers.packed import Documents
from slothcore.models.config import DecoderConfig

Angles = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary positions, [T, P / 2] float32 each."""


class DecoderLayer(nn.Module):
    """Attention, then the gated MLP or routed experts, each behind a norm and added to the residual stream.

    With sandwich norms each branch is normed once more before it is added, and the two norms in the middle have the
    names that Gemma 2 gave them.

    Attributes:
        keep_gate_up: keep the outputs of gate and up, the largest activation, for the backward pass; or multiply them
            again there. The gated MLP heeds it where its base weights are frozen; experts always keep theirs.
    """

    def __init__(self, config: DecoderConfig, index: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        norm = partial(make_norm, config, dtype=dtype, device=device)
        self.keep_gate_up = True
        self.is_local = config.is_local(index)
        self.input_layernorm = norm(config.hidden_size)
        self.self_attn = SelfAttention(
            config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            scale=config.scale,
            window=config.window(index),
            softcap=config.attention_softcap,
            qkv_bias=config.qkv_bias,
            output_bias=config.attention_output_bias,
            fused_qkv=config.fused_qkv,
            head_norm=partial(norm, config.head_dim) if config.qk_norm else None,
            dtype=dtype,
            device=device,
        )
        self.post_attention_layernorm = norm(config.hidden_size)
        self.has_sandwich_norms = config.sandwich_norms
        if config.sandwich_norms:
            self.pre_feedforward_layernorm = norm(config.hidden_size)
            self.post_feedforward_layernorm = norm(config.hidden_size)
        self._feed_forward_name = config.moe.block_name if config.moe and config.is_sparse(index) else "mlp"
        self.add_module(self._feed_forward_name, _feed_forward(config, index, dtype=dtype, device=device))

    def forward(
        self,
        branch: Tensor,
        residual: Tensor | None,
        angles: Angles,
        documents: Documents,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(branch, residual) to (branch, residual), all [T, H], whose sum is the hidden state.

        Args:
            branch, residual: of the layer before; the embedding has no residual.
            angles: of the rotary positions.
            documents, cache: see `SelfAttention`.
        Returns: also the router's logits [T, E] where they are wanted for the auxiliary loss, else None.
        """
        normed = self.input_layernorm(branch, residual, read_by=self.self_attn.read_together)
        branch = self.self_attn(normed, *angles, documents, cache)
        feed_forward, router_logits = self.feed_forward, None
        if self.has_sandwich_norms:
            post, pre = self.post_attention_layernorm, self.pre_feedforward_layernorm
            normed = norm_add_norm(branch, normed.h, post=post, pre=pre)
        else:
            readers = feed_forward.read_together if isinstance(feed_forward, GatedMlp) else ()
            normed = self.post_attention_layernorm(branch, normed.h, read_by=readers)
        if isinstance(feed_forward, SparseMoe):
            branch, router_logits = feed_forward(normed.y)
        else:
            branch = feed_forward(normed, keep_gate_up=self.keep_gate_up)
        if self.has_sandwich_norms:
            branch = self.post_feedforward_layernorm(branch).y
        return branch, normed.h, router_logits

    @property
    def feed_forward(self) -> nn.Module:
        """The MLP or the block of experts, under whichever name the family gives it."""
        module = self._modules[self._feed_forward_name]
        assert module is not None
        return module

    def draws_random_numbers(self) -> bool:
        """Whether a second run must draw the same numbers as the first; saving their state costs a copy."""
        linears = (m for m in self.modules() if isinstance(m, (Linear, ExpertLinear)))
        return any(m.training and m.lora_dropout > 0 for m in linears)


def make_norm(config: DecoderConfig, size: int, *, dtype: torch.dtype, device: torch.device | str) -> RMSNorm:
    """A norm over `size` channels as the configuration wants it."""
    return RMSNorm(
        size,
        eps=config.rms_norm_eps,
        weight_offset=config.norm_weight_offset,
        cast_before_weight=config.norm_casts_before_weight,
        dtype=dtype,
        device=device,
    )


def _feed_forward(config: DecoderConfig, index: int, *, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    moe = config.moe
    if moe is None or not config.is_sparse(index):
        return GatedMlp(
            config.hidden_size,
            config.intermediate_size,
            activation=config.hidden_act,
            bias=config.mlp_bias,
            fused=config.fused_gate_up,
            dtype=dtype,
            device=device,
        )
    return SparseMoe(
        config.hidden_size,
        moe.intermediate_size,
        num_experts=moe.num_experts,
        experts_per_token=moe.experts_per_token,
        normalize_weights=moe.normalize_weights,
        expert_names=moe.expert_names,
        activation=config.hidden_act,
        keeps_router_logits=moe.use_aux_loss,
        dtype=dtype,
        device=device,
    )
