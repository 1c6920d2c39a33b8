"""Host time of each step of a decoder layer: what one call costs before the GPU has done anything.

    python -m benchmarks.ops.host_overhead

Few tokens, so the GPU keeps up and the host is what is timed. The second part profiles a model, forward and backward.
"compiled kernel" is the launch of rms_norm's kernel without Triton's own search for the compiled one: what it leaves
of "Triton launch" no change to a launcher can save.
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
from slothcore.kernels import lora_factors, lora_gemm, nf4
from slothcore.kernels.rms_norm import rms_norm_forward_kernel

CALLS = 200
STEPS = 5


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
    three = (projection, projection, projection)
    trained = x.clone().requires_grad_()
    factor_A, factor_B = A.float(), B.float()
    pairs = {"scalings": (2.0, 2.0, 2.0), "out_features": (4096, 4096, 4096), "dtype": torch.bfloat16}
    arguments = (x, y, weight, x.clone(), y.clone(), torch.empty(tokens, device="cuda"), 4096, 4096, tokens, 1e-5, 0.0)
    constants = {"WIDTH": 4096, "CAST_BEFORE_WEIGHT": True, "BLOCK_ROWS": 1, "BLOCK_COLUMNS": 4096, "EARLY": False}
    compiled = rms_norm_forward_kernel[(tokens,)](*arguments, **constants, num_warps=8)
    heads = {"num_heads": 32, "num_kv_heads": 8, "scale": 0.1}
    return {
        "torch.mm": lambda: x @ dense,
        "torch add": lambda: x + y,
        "torch.empty": lambda: torch.empty(tokens, 4096, **bf16),
        "Triton launch": lambda: rms_norm_forward_kernel[(tokens,)](*arguments, **constants, num_warps=8),
        "compiled kernel": lambda: compiled[(tokens, 1, 1)](*arguments, *constants.values()),
        "rms_norm with residual": lambda: rms_norm.add_rms_norm(x, y, weight, eps=1e-5),
        "rope": lambda: rope.apply_rope(qkv, cos, cos, num_heads=40, inplace=True),
        "attention": lambda: attention.packed_attention(qkv, cu_seqlens, tokens, **heads),
        "glu": lambda: glu.glu(gate_up, activation="silu"),
        "nf4_dequantize": lambda: nf4.nf4_dequantize(nf4_weight, dtype=torch.bfloat16),
        "nf4_dequantize_group, 3": lambda: nf4.nf4_dequantize_group((nf4_weight,) * 3, dtype=torch.bfloat16),
        "pack_factors, 1": lambda: lora_factors.pack_factors(
            (factor_A,), (factor_B,), scalings=(2.0,), out_features=(4096,), dtype=torch.bfloat16
        ),
        "pack_factors, 3": lambda: lora_factors.pack_factors((factor_A,) * 3, (factor_B,) * 3, **pairs),
        "linear_add, by rule": lambda: lora_gemm.linear_add(x, dense, lora_x=u, lora_B=B),
        "linear_add, kernel": lambda: lora_gemm.linear_add(x, dense, lora_x=u, lora_B=B, _path=lora_gemm.HOPPER_TILE),
        "lora_linear, NF4": lambda: lora.lora_linear(x, projection),
        "lora_fused, 3 x NF4": lambda: lora.lora_fused(x, three),
        "lora_linear, and backward": lambda: lora.lora_linear(trained, projection).backward(x),
        "lora_fused, and backward": lambda: lora.lora_fused(trained, three).backward(x.repeat(1, 3)),
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
    settings = Settings(str(folder), 4, "no", 16, longest=args.tokens, device="cuda", graphs=False)
    system = peer("slothcore")
    model = system.load(settings)
    case = shapes.StepCase.parse(f"2x{args.tokens // 2}")
    ids = worker.random_batch(case, 0, config["vocab_size"])
    for _ in range(3):
        system.loss(model, ids, settings).backward()
    # One thread, so that the profiler sees the backward pass.
    with torch.autograd.set_multithreading_enabled(False):
        print_profile(f"forward of {args.layers} layers", lambda: system.loss(model, ids, settings))
        losses = [system.loss(model, ids, settings) for _ in range(STEPS)]
        print_profile(f"backward of {args.layers} layers", lambda: losses.pop().backward())


def print_profile(title: str, call: Callable[[], object]) -> None:
    """Where the host's time goes in `STEPS` calls, by function."""
    torch.cuda.synchronize()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(STEPS):
        call()
    profiler.disable()
    torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(45)
    print(f"\n{title}, {STEPS} times:\n{text.getvalue()}")


if __name__ == "__main__":
    main()
