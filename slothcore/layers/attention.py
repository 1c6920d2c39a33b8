"""Self-attention over the packed token stream."""

import torch
from torch import Tensor, nn

from slothcore.autograd.attention import packed_attention
from slothcore.autograd.rope import apply_rope
from slothcore.layers.kv_cache import LayerCache
from slothcore.layers.linear import Linear, project_together
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
        self.q_proj = Linear(hidden_size, q_size, bias=qkv_bias, dtype=dtype, device=device)
        self.k_proj = Linear(hidden_size, kv_size, bias=qkv_bias, dtype=dtype, device=device)
        self.v_proj = Linear(hidden_size, kv_size, bias=qkv_bias, dtype=dtype, device=device)
        self.o_proj = Linear(q_size, hidden_size, bias=output_bias, dtype=dtype, device=device)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents, cache: LayerCache | None = None
    ) -> Tensor:
        """[T, H] to [T, H].

        Args:
            cos, sin: [T, head_dim / 2] float32.
            documents: boundaries of the packed stream; not read when the cache takes one token a row.
            cache: keys and values are stored there; unless it is reading the prompts, x is one token a row, and each
                attends to its row of the cache.
        """
        q_and_k = self.num_heads + self.num_kv_heads
        qkv = project_together(x, (self.q_proj, self.k_proj, self.v_proj))
        # The heads are split after RoPE: autograd copies a view's gradient whole when the view is changed in place.
        qkv = apply_rope(qkv, cos, sin, num_heads=q_and_k, inplace=True)
        qkv = qkv.view(len(x), q_and_k + self.num_kv_heads, self.head_dim)
        if cache is not None:
            cache.store(qkv[:, self.num_heads : q_and_k], qkv[:, q_and_k:])
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
