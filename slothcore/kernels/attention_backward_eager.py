"""Eager twin of `attention_backward.py`: the derivation there, line by line, on whole documents."""

from torch import Tensor

from slothcore.kernels.attention_eager import by_key_head, heads_first, masked_scores, rows_of_documents


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As `attention_backward.attention_backward`."""
    tokens, num_heads, head_dim = q.shape
    num_key_heads = k.shape[1]
    dqkv = q.new_empty((tokens, num_heads + 2 * num_key_heads, head_dim))
    dq, dk, dv = dqkv.split((num_heads, num_key_heads, num_key_heads), dim=1)
    for rows in rows_of_documents(cu_seqlens, num_heads):
        queries, grads, outs = (by_key_head(heads_first(x, rows), num_key_heads) for x in (q, dout, out))
        keys, values = heads_first(k, rows), heads_first(v, rows)
        row_lse = by_key_head(lse[:, rows].transpose(0, 1)[..., None], num_key_heads)
        delta = (grads * outs).sum(-1, keepdim=True)
        scores = masked_scores(queries, keys, scale=scale, window=window, softcap=softcap)
        p = (scores - row_lse).exp_()
        ds = (grads @ values.transpose(-1, -2)).sub_(delta).mul_(p)
        if softcap is not None:
            # A hidden score is -inf and its ds zero; the slope there must not be infinite.
            ds *= 1 - (scores.clamp_(min=-softcap) / softcap).square_()
        p, ds = (x.to(q.dtype).to(keys.dtype) for x in (p, ds))
        by_head = (ds @ keys).mul_(scale).reshape(rows.shape[0], num_heads, rows.shape[1], head_dim)
        dq[rows] = by_head.transpose(1, 2).to(dq.dtype)
        dk[rows] = (ds.transpose(-1, -2) @ queries).mul_(scale).transpose(1, 2).to(dk.dtype)
        dv[rows] = (p.transpose(-1, -2) @ grads).transpose(1, 2).to(dv.dtype)
    return dqkv
