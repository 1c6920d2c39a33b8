"""The floor of a training step: the matrix products and the attention that it cannot do without, and nothing else.

    python -m benchmarks.floor REQUEST.json RESULTS.jsonl

`run.py` starts it in the same run as the systems. A product is one `torch.matmul` of the model's own shapes, with q, k
and v in one and gate and up in another; attention is the fastest of what torch offers for these documents and
slothcore's own, forward and backward chosen apart. LoRA, quantisation, norms, the optimizer and the host are left out:
they are what a step adds.

It is measured the way a step runs: all products of all layers in the step's order, on random numbers, step after step
for a second or more, nothing waiting between them. A chip at its power limit is slower there than in a short burst of
one product, and a step cannot be faster than this.

The frozen weights get no gradient, so a linear is two products; the first layer's input none, so there q, k and v are
one. What is computed again in the backward pass counts twice.
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
from benchmarks.worker import Clock
from slothcore.autograd.attention import packed_attention

# Logits are formed in slices, as every system must; 128256 of them a token would not fit otherwise.
HEAD_ROWS = 2048
BACKENDS = {"cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], "cpu": [SDPBackend.MATH]}
# Longer steps repeat what shorter ones do: from here on a token costs the same.
LARGEST_TOKENS = 16384
WARM_STEPS = 1
FEWEST_STEPS = 2
SECONDS = {"cuda": 1.2, "cpu": 0.0}
Launch = Callable[[], object]


@dataclass(frozen=True)
class Floor:
    """Milliseconds of a whole step: over all layers, and in the head."""

    products_forward: float
    products_backward: float
    attention_forward: float
    attention_backward: float
    head: float
    gate_up: float  # of products_forward
    attention: str  # the implementations that won: forward, backward
    host: float = 0.0  # what the host took to issue it all; no part of the sum

    def times(self, factor: float) -> "Floor":
        """The floor of as many times the documents."""
        values = {name: value if name == "attention" else factor * value for name, value in asdict(self).items()}
        return Floor(**values)

    def step_ms(self, recompute: str) -> float:
        """The floor with what is computed again: nothing, gate and up ("mlp", "offload"), or all of a layer ("yes")."""
        forward = self.products_forward + self.attention_forward
        again = {"no": 0.0, "mlp": self.gate_up, "offload": self.gate_up, "yes": forward}[recompute]
        return self.head + forward + self.products_backward + self.attention_backward + again


def main(request_path: str, results_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    dtype = torch.float32 if request["bits"] == 32 else torch.bfloat16
    measured: dict[tuple[int, ...], Floor] = {}
    for name in request["cases"]:
        whole = typical_lengths(name)
        lengths = tuple(shortened(whole))
        if lengths not in measured:
            measured[lengths] = measure(request["config"], list(lengths), dtype=dtype, device=request["device"])
        floor = measured[lengths].times(len(whole) / len(lengths))
        with open(results_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"case": name, "bits": request["bits"], **asdict(floor)}) + "\n")
        if request["device"] == "cuda":
            torch.cuda.empty_cache()


def typical_lengths(name: str) -> list[int]:
    """The sequences of the step with the median number of tokens, the smaller of two in the middle."""
    case, _ = parse_case(name)
    drawn = sorted((case.lengths(step) for step in range(case.batches)), key=sum)
    return drawn[(len(drawn) - 1) // 2]


def shortened(lengths: list[int]) -> list[int]:
    """Fewer of the documents where they are alike and many, so that the rest is a multiple."""
    fewer = max(1, LARGEST_TOKENS // lengths[0])
    return lengths if len(set(lengths)) > 1 else lengths[:fewer]


def measure(config: dict[str, Any], lengths: list[int], *, dtype: torch.dtype, device: str) -> Floor:
    """The floor of a step of a Llama of this configuration over documents of these lengths."""
    forward, backward, names = fastest_attention(config, lengths, dtype, device)
    parts = list(bare_step(config, lengths, forward, backward, dtype, device))
    with torch.no_grad():
        spent, host = time_parts([launch for _, launch in parts], device)
    sums: dict[str, float] = {}
    for (kind, _), milliseconds in zip(parts, spent, strict=True):
        sums[kind] = sums.get(kind, 0.0) + milliseconds
    gate_up = sums.pop("gate_up")
    sums["products_forward"] += gate_up
    return Floor(**sums, gate_up=gate_up, attention=names, host=host)


def bare_step(
    config: dict[str, Any],
    lengths: list[int],
    attention_forward: Launch,
    attention_backward: Launch,
    dtype: torch.dtype,
    device: str,
) -> Iterator[tuple[str, Launch]]:
    """What a step launches, in its order, each with the part of the floor that it belongs to.

    All layers share their operands. That is no help from a cache: those of one layer are larger than it, or in a step
    of few tokens come straight from the product before.
    """
    tokens, layers, hidden = sum(lengths), config["num_hidden_layers"], config["hidden_size"]
    query_columns = config["num_attention_heads"] * config["head_dim"]
    qkv_columns = query_columns + 2 * config["num_key_value_heads"] * config["head_dim"]
    qkv, output, gate_up, down = (
        products(tokens, columns, rows, dtype, device)
        for columns, rows in (
            (hidden, qkv_columns),
            (query_columns, hidden),
            (hidden, 2 * config["intermediate_size"]),
            (config["intermediate_size"], hidden),
        )
    )
    for _ in range(layers):
        yield "products_forward", qkv[0]
        yield "attention_forward", attention_forward
        yield "products_forward", output[0]
        yield "gate_up", gate_up[0]
        yield "products_forward", down[0]
    targets = tokens - len(lengths)
    slices = [min(HEAD_ROWS, targets - start) for start in range(0, targets, HEAD_ROWS)]
    heads = {rows: products(rows, hidden, config["vocab_size"], dtype, device) for rows in sorted(set(slices))}
    for rows in slices:
        yield "head", heads[rows][0]
        yield "head", heads[rows][1]
    for layer in reversed(range(layers)):
        yield "products_backward", down[1]
        yield "products_backward", gate_up[1]
        yield "products_backward", output[1]
        yield "attention_backward", attention_backward
        if layer > 0:
            yield "products_backward", qkv[1]


def products(rows: int, in_features: int, out_features: int, dtype: torch.dtype, device: str) -> tuple[Launch, Launch]:
    """x W^T and dY W."""
    # Random numbers, because a GPU multiplies zeros faster. Standard normal ones are what activations look like.
    x = torch.randn(rows, in_features, dtype=dtype, device=device)
    weight = torch.randn(out_features, in_features, dtype=dtype, device=device)
    y, dx = x.new_empty(rows, out_features), torch.empty_like(x)
    dy = torch.randn_like(y)
    return partial(torch.matmul, x, weight.T, out=y), partial(torch.matmul, dy, weight, out=dx)


def time_parts(launches: list[Launch], device: str) -> tuple[list[float], float]:
    """Milliseconds of each launch in a step of all, while steps follow one another; and what the host takes for a step.

    The whole step is timed first, with no mark inside it. Marks cost time of their own, so the steps that hold them
    only say how the whole is shared out.
    """
    inner = [False] * len(launches)
    for _ in range(WARM_STEPS):
        issue(launches, inner, device)
    inner[-1] = True
    whole, host = back_to_back(launches, inner, device, SECONDS[device])
    parts, _ = back_to_back(launches, [True] * len(launches), device, 0.0)
    scale = whole[0] / sum(parts)
    return [scale * part for part in parts], host


def back_to_back(launches: list[Launch], marked: list[bool], device: str, seconds: float) -> tuple[list[float], float]:
    """The median milliseconds between marks, of steps that follow one another for so long; and of the host."""
    rounds: list[list[float]] = []
    host: list[float] = []
    begun = time.perf_counter()
    before: Clock | None = None
    while len(host) < FEWEST_STEPS or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        clock = issue(launches, marked, device)
        host.append(1e3 * (time.perf_counter() - start))
        # The step before is waited for when this one is in the queue, so the GPU never is without work.
        if before is not None:
            rounds.append(before.milliseconds())
        before = clock
    assert before is not None
    rounds.append(before.milliseconds())
    # A CPU does the work while it issues it.
    waited = statistics.median(host) if device == "cuda" else 0.0
    return [statistics.median(times) for times in zip(*rounds, strict=True)], waited


def issue(launches: list[Launch], marked: list[bool], device: str) -> Clock:
    """Launch all, with a mark before the first and after each that is to have one."""
    clock = Clock(device)
    clock.mark()
    for launch, mark in zip(launches, marked, strict=True):
        launch()
        if mark:
            clock.mark()
    return clock


def fastest_attention(
    config: dict[str, Any], lengths: list[int], dtype: torch.dtype, device: str
) -> tuple[Launch, Launch, str]:
    """The fastest forward and the fastest backward pass of one layer's attention, and whose they are."""
    forward: dict[str, tuple[float, Launch]] = {}
    backward: dict[str, tuple[float, Launch]] = {}
    for name, leaves, attend in attentions(config, lengths, dtype, device):
        try:
            out = attend(*leaves)
            again = partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)
            again()
        except (ImportError, RuntimeError):
            # This one is not for this torch, GPU or head_dim.
            continue
        # Inference alone: `measure` runs them without autograd.
        plain = partial(attend, *(leaf.detach() for leaf in leaves))
        forward[name] = milliseconds(plain, device), plain
        backward[name] = milliseconds(again, device), again
    first, second = (min(found, key=lambda name: found[name][0]) for found in (forward, backward))
    return forward[first][1], backward[second][1], f"{first}, {second}"


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

        return float(do_bench(function, warmup=10, rep=60, return_mode="median"))
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


if __name__ == "__main__":
    main(*sys.argv[1:])
