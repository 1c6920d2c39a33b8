"""The floor of a training step: the matrix products and the attention that it cannot do without, timed bare.

    python -m benchmarks.floor REQUEST.json RESULTS.jsonl

`run.py` starts it in the same run as the systems. A product is one `torch.matmul` of the model's own shapes, with q, k
and v in one and gate and up in another; attention is the fastest of what torch offers for these documents and
slothcore's own. LoRA, quantisation, norms, the optimizer and the host are left out: they are what a step adds.
The frozen weights get no gradient, so a linear is two products; the first layer's input none, so there q, k and v are
one. With recomputation the layers' forward half counts twice.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.shapes import parse_case
from slothcore.autograd.attention import packed_attention

# Logits are formed in slices, as every system must; 128256 of them a token would not fit otherwise.
HEAD_ROWS = 8192
BACKENDS = {"cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], "cpu": [SDPBackend.MATH]}


@dataclass(frozen=True)
class Floor:
    """Milliseconds of a whole step: over all layers, and in the head."""

    products_forward: float
    products_backward: float
    attention_forward: float
    attention_backward: float
    head: float
    attention: str  # the implementations that won: forward, backward

    def step_ms(self, *, recompute: bool) -> float:
        forward = self.products_forward + self.attention_forward
        backward = self.products_backward + self.attention_backward
        return self.head + (2 if recompute else 1) * forward + backward


def main(request_path: str, results_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    dtype = torch.float32 if request["bits"] == 32 else torch.bfloat16
    for name in request["cases"]:
        lengths = typical_lengths(name, request["warmup"], request["steps"])
        floor = measure(request["config"], lengths, dtype=dtype, device=request["device"])
        with open(results_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"case": name, **asdict(floor)}) + "\n")
        if request["device"] == "cuda":
            torch.cuda.empty_cache()


def typical_lengths(name: str, warmup: int, steps: int) -> list[int]:
    """The sequences of the timed step with the median number of tokens."""
    case, _ = parse_case(name)
    drawn = sorted((case.lengths(step) for step in range(warmup, warmup + steps)), key=sum)
    return drawn[len(drawn) // 2]


def measure(config: dict[str, Any], lengths: list[int], *, dtype: torch.dtype, device: str) -> Floor:
    """The floor of a step of a Llama of this configuration over documents of these lengths."""
    tokens, layers, hidden = sum(lengths), config["num_hidden_layers"], config["hidden_size"]
    query_columns = config["num_attention_heads"] * config["head_dim"]
    qkv_columns = query_columns + 2 * config["num_key_value_heads"] * config["head_dim"]
    qkv_forward, qkv_backward = linear_ms(tokens, hidden, qkv_columns, dtype, device)
    others = [
        linear_ms(tokens, *columns, dtype, device)
        for columns in (
            (query_columns, hidden),
            (hidden, 2 * config["intermediate_size"]),
            (config["intermediate_size"], hidden),
        )
    ]
    targets = tokens - len(lengths)
    rows = min(targets, HEAD_ROWS)
    head = sum(linear_ms(rows, hidden, config["vocab_size"], dtype, device)) * targets / rows
    forward, backward, names = attention_ms(config, lengths, dtype, device)
    return Floor(
        products_forward=layers * (qkv_forward + sum(forward for forward, _ in others)),
        products_backward=(layers - 1) * qkv_backward + layers * sum(backward for _, backward in others),
        attention_forward=layers * forward,
        attention_backward=layers * backward,
        head=head,
        attention=names,
    )


def linear_ms(rows: int, in_features: int, out_features: int, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """x W^T and dY W."""
    # Random numbers, because a GPU multiplies zeros faster.
    x = torch.randn(rows, in_features, dtype=dtype, device=device)
    dy = torch.randn(rows, out_features, dtype=dtype, device=device)
    weight = torch.randn(out_features, in_features, dtype=dtype, device=device)
    forward, backward = partial(torch.matmul, x, weight.T), partial(torch.matmul, dy, weight)
    return milliseconds(forward, device), milliseconds(backward, device)


def attention_ms(
    config: dict[str, Any], lengths: list[int], dtype: torch.dtype, device: str
) -> tuple[float, float, str]:
    """The fastest forward and the fastest backward pass of one layer's attention, and whose they were."""
    forward, backward = {}, {}
    for name, leaves, attend in attentions(config, lengths, dtype, device):
        try:
            out = attend(*leaves)
            dout = torch.randn_like(out)
            torch.autograd.grad(out, leaves, dout, retain_graph=True)
        except (ImportError, RuntimeError):
            # This one is not for this torch, GPU or head_dim.
            continue
        forward[name] = milliseconds(partial(attend, *leaves), device)
        backward[name] = milliseconds(partial(torch.autograd.grad, out, leaves, dout, retain_graph=True), device)
    first, second = min(forward, key=forward.__getitem__), min(backward, key=backward.__getitem__)
    return forward[first], backward[second], f"{first}, {second}"


def attentions(
    config: dict[str, Any], lengths: list[int], dtype: torch.dtype, device: str
) -> Iterator[tuple[str, list[Tensor], Callable[..., Tensor]]]:
    """Causal attention over the same random documents by every means at hand: its name, its inputs, the function.

    Inputs and output are laid out as each likes best: a batch [documents, heads, length, D] where all lengths are
    equal, or the packed stream [T, heads, D], or slothcore's qkv in one, to [T, heads * D].
    """
    heads, kv_heads, dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    longest = max(lengths)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    generator = torch.Generator(device).manual_seed(0)
    shape = (sum(lengths), heads + 2 * kv_heads, dim)
    qkv = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    separate = qkv.split([heads, kv_heads, kv_heads], dim=1)

    def packed(qkv: Tensor) -> Tensor:
        return packed_attention(qkv, bounds, longest, num_heads=heads, num_kv_heads=kv_heads, scale=dim**-0.5)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out

    def batched(q: Tensor, k: Tensor, v: Tensor, *, backends: list[SDPBackend]) -> Tensor:
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def leaves(parts: Iterable[Tensor]) -> list[Tensor]:
        return [part.contiguous().detach().requires_grad_() for part in parts]

    yield "slothcore", leaves([qkv]), packed
    if device == "cuda":
        yield "varlen_attn", leaves(separate), varlen
    if len(set(lengths)) == 1:
        rows = [part.unflatten(0, (-1, longest)).transpose(1, 2) for part in separate]
        for backend in BACKENDS[device]:
            yield f"SDPA {backend.name.lower()}", leaves(rows), partial(batched, backends=[backend])


def milliseconds(function: Callable[[], object], device: str) -> float:
    """The median time of a call: of the GPU with a cold L2 cache, or of the CPU."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=20, rep=100, return_mode="median"))
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


if __name__ == "__main__":
    main(*sys.argv[1:])
