"""Host time of each step of a decoder layer: what one call costs before the GPU has done anything.

    python -m benchmarks.ops.host_overhead

Few tokens, so the GPU keeps up and the host is what is timed. The second part profiles the forward pass of a model.
"""

import argparse
import cProfile
import io
import pstats
import time
from collections.abc import Callable

import torch

from benchmarks import checkpoint, shapes, worker
from benchmarks.peers import Settings, peer
from slothcore.autograd import attention, glu, lora, rms_norm, rope
from slothcore.kernels import lora_gemm, nf4

CALLS = 200


def microseconds(call: Callable[[], object]) -> float:
    """Host time of one call, the best of three rounds."""
    call()
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - start) / CALLS)
    torch.cuda.synchronize()
    return 1e6 * best


def operations(tokens: int) -> dict[str, Callable[[], object]]:
    """The steps of a layer of Llama-3.1-8B's widths, each on its own small input."""
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    x, y, weight = torch.randn(tokens, 4096, **bf16), torch.randn(tokens, 4096, **bf16), torch.ones(4096, **bf16)
    qkv = torch.randn(tokens, 48, 128, **bf16)
    cos = torch.randn(tokens, 64, device="cuda")
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    gate_up = torch.randn(tokens, 2048, **bf16)
    nf4_weight = nf4.nf4_quantize(torch.randn(4096, 4096, **bf16))
    dense, A, B = torch.randn(4096, 4096, **bf16), torch.randn(16, 4096, **bf16), torch.randn(4096, 16, **bf16)
    u = torch.randn(tokens, 16, **bf16)
    projection = lora.Projection(nf4_weight, A.float().requires_grad_(), B.float().requires_grad_())
    heads = {"num_heads": 32, "num_kv_heads": 8, "scale": 0.1}
    return {
        "torch.mm": lambda: x @ dense,
        "torch add": lambda: x + y,
        "torch.empty": lambda: torch.empty(tokens, 4096, **bf16),
        "rms_norm with residual": lambda: rms_norm.add_rms_norm(x, y, weight, eps=1e-5),
        "rope": lambda: rope.apply_rope(qkv, cos, cos, num_heads=40, inplace=True),
        "attention": lambda: attention.packed_attention(qkv, cu_seqlens, tokens, **heads),
        "glu": lambda: glu.glu(gate_up, activation="silu"),
        "nf4_dequantize": lambda: nf4.nf4_dequantize(nf4_weight, dtype=torch.bfloat16),
        "linear_add, by rule": lambda: lora_gemm.linear_add(x, dense, lora_x=u, lora_B=B),
        "linear_add, kernel": lambda: lora_gemm.linear_add(x, dense, lora_x=u, lora_B=B, _path=lora_gemm.HOPPER_TILE),
        "lora_linear, NF4": lambda: lora.lora_linear(x, projection),
        "lora_fused, 3 x NF4": lambda: lora.lora_fused(x, (projection, projection, projection)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    for name, call in operations(args.tokens).items():
        print(f"{microseconds(call):8.1f} us  {name}")

    config = shapes.LLAMA_3_1_8B | {"num_hidden_layers": args.layers}
    folder = checkpoint.write_checkpoint(checkpoint.default_folder(config), config, device="cuda")
    settings = Settings(str(folder), 4, False, 16, longest=args.tokens, device="cuda")
    system = peer("slothcore")
    model = system.load(settings)
    case = shapes.StepCase.parse(f"2x{args.tokens // 2}")
    ids = worker.random_batch(case, 0, config["vocab_size"])
    for _ in range(3):
        system.loss(model, ids, settings).backward()
    torch.cuda.synchronize()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(5):
        loss = system.loss(model, ids, settings)
    profiler.disable()
    loss.backward()
    torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(45)
    print(f"\nforward of {args.layers} layers, 5 times:\n{text.getvalue()}")


if __name__ == "__main__":
    main()
