"""Self-attention over the packed token stream."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slothcore.autograd.attention import packed_attention
from slothcore.autograd.qk_norm import qk_norm_rope
from slothcore.autograd.rms_norm import Normed
from slothcore.autograd.rope import apply_rope
from slothcore.layers.layer_cache import LayerCache
from slothcore.layers.linear import Linear, project_together
from slothcore.layers.norm import RMSNorm
from slothcore.layers.packed import Documents


class SelfAttention(nn.Module):
    """Causal attention with grouped queries and rotary positions; no token sees another document.

    Args:
        hidden_size: width of the residual stream.
        num_heads, num_kv_heads: query heads, and key/value heads, each shared by num_heads / num_kv_heads of them.
        head_dim: width of one head; num_heads * head_dim need not be hidden_size.
        scale: factor of the scores before the softmax.
        window: a token sees at most this many tokens, itself included; None: its whole document.
        softcap: scores s become softcap * tanh(s / softcap); None: they stay.
        qkv_bias, output_bias: whether the projections in and out add a bias.
        fused_qkv: one layer `qkv_proj` whose rows are those of q, k and v, as Phi-3's checkpoints have it.
        head_norm: makes the norm of one head, applied to each query and key head before RoPE (`q_norm`, `k_norm`);
            None: they are not normed.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        fused_qkv: bool = False,
        head_norm: Callable[[], RMSNorm] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = scale
        self.window = window
        self.softcap = softcap
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        if fused_qkv:
            sizes = {"qkv_proj": q_size + 2 * kv_size}
        self._names = tuple(sizes)
        for name, size in sizes.items():
            self.add_module(name, Linear(hidden_size, size, bias=qkv_bias, dtype=dtype, device=device))
        self.q_norm = None if head_norm is None else head_norm()
        self.k_norm = None if head_norm is None else head_norm()
        self.o_proj = Linear(q_size, hidden_size, bias=output_bias, dtype=dtype, device=device)

    @property
    def read_together(self) -> list[Linear]:
        """The layers that read the input."""
        layers: list[Any] = [self._modules[name] for name in self._names]
        return layers

    def forward(
        self, x: Tensor | Normed, cos: Tensor, sin: Tensor, documents: Documents, cache: LayerCache | None = None
    ) -> Tensor:
        """[T, H] to [T, H].

        Args:
            x: the input, or the norm that made it.
            cos, sin: [T, P / 2] float32; the first P channels of a head are rotated, the rest stay.
            documents: boundaries of the packed stream; not read where the tokens attend to the cache.
            cache: keys and values are stored there, without gradients; unless it is reading prompts, each token
                attends to its row of the cache.
        """
        q_and_k = self.num_heads + self.num_kv_heads
        qkv = project_together(x, self.read_together)
        # The heads are split after RoPE: autograd copies a view's gradient whole when the view is changed in place.
        if self.q_norm is not None and self.k_norm is not None:
            qkv = qk_norm_rope(
                qkv,
                self.q_norm.weight,
                self.k_norm.weight,
                cos,
                sin,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                **self.q_norm.rule._asdict(),
            )
        elif cache is None:
            qkv = apply_rope(qkv, cos, sin, num_heads=q_and_k, head_dim=self.head_dim, inplace=True)
        qkv = qkv.view(len(qkv), q_and_k + self.num_kv_heads, self.head_dim)
        if cache is not None:
            angles = (cos, sin) if self.q_norm is None else None
            qkv = cache.store_(qkv, angles, num_heads=self.num_heads)
        if cache is not None and not cache.is_prompt:
            query = qkv[:, : self.num_heads]
            mixed = cache.attend(query, scale=self.scale, window=self.window, softcap=self.softcap).flatten(1)
        else:
            mixed = packed_attention(
                qkv,
                documents.cu_seqlens,
                documents.max_seqlen,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                scale=self.scale,
                window=self.window,
                softcap=self.softcap,
            )
        return self.o_proj(mixed)

    def extra_repr(self) -> str:
        heads = f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"{heads}, scale={self.scale:.6g}, window={self.window}, softcap={self.softcap}"
