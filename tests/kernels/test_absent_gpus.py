"""GPUs that are not here: every kernel of a training step and of writing compiles for them and fits."""

import pytest

from tests.kernels.compiled_for import Capability, found_pretending

# Compute capability, multiprocessors, and KiB of shared memory that one program may use (CUDA C++ guide). For an
# RTX 4090 everything is as for a 3090.
GPUS: dict[str, tuple[Capability, int, int]] = {
    "T4": ((7, 5), 40, 64),
    "A100": ((8, 0), 108, 163),
    "RTX 3090": ((8, 6), 82, 99),
    "H100": ((9, 0), 132, 227),
    "B200": ((10, 0), 148, 227),
    "RTX 5090": ((12, 0), 170, 99),
}

MODELS = """
from slothcore.kernels import largest, nf4_gemm_group, nf4_tensor, paged_attention, rope_store
from slothcore.layers.packed import pack_inputs
from slothcore.lora.attach import add_lora
from slothcore.models import decoder
from slothcore.models.load import from_config

LLAMA = dict(
    model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5,
    hidden_act="silu", tie_word_embeddings=False,
)
GEMMA2 = dict(
    LLAMA, model_type="gemma2", hidden_size=2304, intermediate_size=9216, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, head_dim=256, vocab_size=256000, hidden_act="gelu_pytorch_tanh", sliding_window=4096,
    hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256, attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0, tie_word_embeddings=True,
)
QWEN3 = dict(LLAMA, model_type="qwen3", intermediate_size=12288, vocab_size=151936)
MIXTRAL = dict(LLAMA, model_type="mixtral", vocab_size=32000, num_local_experts=8, num_experts_per_tok=2)

HALF = "bfloat16" if CAPABILITY >= (8, 0) else "float16"
# Where programs say how far they are: a place for each stream, of which there are none.
nf4_gemm_group._flags_for = lambda device: torch.empty(264, dtype=torch.int32)
# Made of numbers, which fake tensors do not have; from here on they are at hand.
nf4_tensor.nested_code(), nf4_tensor.nf4_code(torch.device("cpu"))


def train(config, rows, dtype=HALF, **lora):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = from_config(config, bits=4, dtype=dtype, device="cpu").train()
        add_lora(model, **lora)
    for count in rows:
        ids = torch.zeros(1, count, dtype=torch.int64)
        packed = pack_inputs(ids, labels=ids, vocab_size=config["vocab_size"])
        decoder.pack_inputs = lambda *unused, **others: packed
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(ids, labels=ids).loss.backward()


def write(config, texts, dtype=HALF):
    heads, kv_heads, dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    with FakeTensorMode():
        empty = lambda *shape, kind=getattr(torch, dtype): torch.empty(*shape, dtype=kind)
        count = lambda *shape: empty(*shape, kind=torch.int32)
        pages = [empty(64, 64, kv_heads, dim) for _ in range(2)]
        angles = [empty(texts, dim // 2, kind=torch.float32) for _ in range(2)]
        qkv, table = empty(texts, heads + 2 * kv_heads, dim), count(texts, 16)
        places = count(texts), count(texts)
        rope_store.rope_store_(qkv, *angles, *pages, table, *places, count(texts), num_heads=heads)
        for one_row in (False, True):
            paged_attention.paged_attention(
                qkv[:, :heads], *pages, table, *places, scale=dim**-0.5, window=config.get("sliding_window"),
                softcap=config.get("attn_logit_softcapping"), one_row=one_row,
            )
        largest.largest(empty(texts, config["vocab_size"]))



def launched():
    for name, kernel, options in launches:
        sizes = dict((key, value) for key, value in options.items() if key.isupper() and isinstance(value, int))
        found.append([name, kernel.metadata.shared, sizes])
"""
ROWS = (4096, 512, 200, 16, 2)
EVERYTHING = f"""
train(LLAMA, {ROWS}, r=16)
train(LLAMA, (512,), r=16, use_dora=True)
train(LLAMA, (128,), "float32", r=16)
train(GEMMA2, (512,), r=64)
train(QWEN3, (512,), r=8)
train(MIXTRAL, (512,), r=16)
for config in (LLAMA, GEMMA2):
    write(config, 1), write(config, 128)
launched()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", GPUS)
def test_every_kernel_compiles_and_fits_the_shared_memory(name: str) -> None:
    capability, multiprocessors, kib = GPUS[name]
    found = found_pretending(MODELS + EVERYTHING, capability, multiprocessors=multiprocessors)
    launched = {kernel for kernel, _, _ in found}
    assert {"attention_key_gradient_kernel", "nf4_linear_kernel", "lora_factors_kernel"} <= launched
    assert {"grouped_product_kernel", "dora_scale_kernel", "paged_attention_kernel"} <= launched
    assert [launch for launch in found if launch[1] > kib * 1024] == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("T4", 16), ("A100", 256)])
def test_without_tensor_cores_only_few_rows_are_multiplied_beside_decoding(name: str, most: int) -> None:
    """Of more rows a program has more sums than registers then."""
    capability, multiprocessors, _ = GPUS[name]
    script = f"{MODELS}\ntrain(LLAMA, {ROWS}, r=16)\nlaunched()"
    found = found_pretending(script, capability, multiprocessors=multiprocessors)
    assert max(sizes["BLOCK_M"] for kernel, _, sizes in found if kernel == "nf4_linear_kernel") == most
