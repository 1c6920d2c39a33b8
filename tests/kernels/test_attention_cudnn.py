"""When cuDNN computes the forward pass, and that the packed stream reaches it and comes back unharmed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from slothcore.kernels import attention, attention_cudnn
from slothcore.kernels.attention_cudnn import cudnn_fits, cudnn_serves
from tests.kernels.test_attention import EAGER, FUSED, Problem


@pytest.fixture
def served_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper: what a CPU without cuDNN can answer of the rule is its shapes."""
    monkeypatch.setattr(attention_cudnn, "cudnn_serves", lambda *_: True)


def heads(tokens: int = 4096, num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 64) -> tuple[Tensor, ...]:
    qkv = torch.zeros(tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=torch.bfloat16)
    return qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)


@pytest.mark.parametrize(
    ("tokens", "documents", "max_seqlen", "options", "fits"),
    [
        (4096, 2, 2048, {}, True),
        (4096, 8, 512, {}, True),
        (4096, 1, 4096, {"window": 4096}, True),
        (4096, 1, 4096, {"window": 4095}, False),
        (4096, 2, 2048, {"softcap": 50.0}, False),
        (4096, 3, 2048, {}, False),  # at least one is shorter
        (4096, 2, 2560, {}, False),
        (4096, 16, 256, {}, False),  # too many lengths would each be planned for
        (5120, 4, 1280, {}, False),
        (2048, 1, 2048, {}, False),
        (0, 0, 512, {}, False),
    ],
)
def test_shapes_that_fit(
    tokens: int, documents: int, max_seqlen: int, options: dict[str, Any], fits: bool, served_everywhere
) -> None:
    options = {"window": None, "softcap": None, **options}
    assert cudnn_fits(*heads(tokens), documents, max_seqlen, **options) is fits


def test_layouts_that_fit(served_everywhere) -> None:
    q, k, v = heads()
    options = {"documents": 2, "max_seqlen": 2048, "window": None, "softcap": None}
    assert cudnn_fits(q, k, v, **options)
    assert cudnn_fits(q.contiguous(), k, v, **options)
    odd = torch.zeros(4096, 129, dtype=torch.bfloat16)[:, 1:].unflatten(1, (2, 64))
    assert not cudnn_fits(q, odd, v, **options)
    assert not cudnn_fits(q, k, v[:1].expand(4096, 2, 64), **options)
    assert not cudnn_fits(q, k.transpose(1, 2).contiguous().transpose(1, 2), v, **options)
    far = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device="meta").as_strided((4096, 2, 64), (2**20, 64, 1))
    assert not cudnn_fits(far, k, v, **options)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "capability"),
    [
        (64, torch.bfloat16, None),
        (64, torch.bfloat16, (8, 0)),
        (64, torch.bfloat16, (8, 9)),
        (64, torch.bfloat16, (12, 0)),
        (96, torch.bfloat16, (9, 0)),
        (256, torch.bfloat16, (9, 0)),
        (128, torch.float32, (9, 0)),
    ],
)
def test_devices_and_heads_not_served(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert cudnn_serves.__wrapped__(64, torch.float16, (9, 0))
    assert not cudnn_serves.__wrapped__(head_dim, dtype, capability)


def test_torch_without_cudnn_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert not cudnn_serves.__wrapped__(64, torch.float16, (9, 0))


def stand_in(q: Tensor, k: Tensor, v: Tensor, *flags: Any, scale: float) -> tuple[Tensor, Tensor]:
    """What cuDNN's operator gives, in its layout: out [B, H, S, D] laid out as q is, lse [B, H, S, 1]."""
    assert flags == (None, True, 0.0, True, False)  # bias, with lse, dropout, causal, debug mask
    documents, num_heads, length, head_dim = q.shape
    bounds = torch.arange(0, documents * length + 1, length, dtype=torch.int32)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    out, lse = EAGER[0](*flat, bounds, length, scale=scale)
    by_document = out.view(documents, length, num_heads, head_dim).transpose(1, 2)
    return by_document, lse.view(num_heads, documents, length).transpose(0, 1).contiguous()[..., None]


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("token_by_token", [True, False])
def test_the_packed_stream_goes_there_and_back(
    documents: int, token_by_token: bool, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the layout of its output, and with our backward pass after it, which reads that output and lse."""
    calls = []

    def operator(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append(inputs)
        out, lse = stand_in(*inputs, **options)
        return out if token_by_token else out.contiguous(), lse

    monkeypatch.setattr(attention, "cudnn_fits", lambda *_, **__: True)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", operator)
    problem = Problem((33,) * documents, 4, 2, 16)
    qkv, dout = problem.inputs("cpu", torch.float32)
    expected = problem.run(EAGER, qkv, dout)
    result = problem.run((attention.attention_forward, EAGER[1]), qkv, dout)
    assert len(calls) == 1
    assert all(x.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for x in calls[0][:3])
    for name, tensor in result.items():
        assert torch.equal(tensor, expected[name]), name
    assert result["out"].is_contiguous()
    assert result["lse"].is_contiguous()


EQUAL_PROBLEMS = {
    "one document": Problem((4096,), 4, 1, 128),
    "grouped": Problem((2048,) * 3, 8, 2, 128),
    "short documents": Problem((512,) * 9, 8, 2, 128),
    "as many key heads": Problem((1024,) * 4, 4, 4, 128),
    "head_dim 64": Problem((1024,) * 4, 8, 2, 64),
    "an odd scale": Problem((1536,) * 3, 4, 2, 128, {"scale": 0.2}),
}


def cudnn_or_skip(problem: Problem, dtype: torch.dtype) -> None:
    if not cudnn_serves(problem.head_dim, dtype, torch.cuda.get_device_capability()):
        pytest.skip("cuDNN does not serve this device")
    qkv, _ = problem.inputs("cuda", dtype)
    q, k, v = qkv.split((problem.num_heads, problem.num_kv_heads, problem.num_kv_heads), dim=1)
    assert cudnn_fits(q, k, v, len(problem.lengths), problem.lengths[0], window=None, softcap=None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("problem", EQUAL_PROBLEMS.values(), ids=EQUAL_PROBLEMS.keys())
def test_equal_documents(problem: Problem, dtype: torch.dtype, nan_filled_empty) -> None:
    cudnn_or_skip(problem, dtype)
    problem.check("cuda", dtype)


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    """A plan made at the warm-up serves the capture, and the replay reads new inputs."""
    problem = Problem((1024,) * 4, 8, 2, 128)
    cudnn_or_skip(problem, torch.bfloat16)
    (qkv, dout), (other, _) = (problem.inputs("cuda", torch.bfloat16) for _ in range(2))
    expected = [problem.run(FUSED, x, dout) for x in (qkv, other)]
    bounds = torch.arange(0, 4097, 1024, dtype=torch.int32, device="cuda")
    buffer = qkv.clone()
    q, k, v = buffer.split((8, 2, 2), dim=1)
    options = {"scale": 128**-0.5}

    def step() -> tuple[Tensor, Tensor, Tensor]:
        out, lse = FUSED[0](q, k, v, bounds, 1024, **options)
        return out, lse, FUSED[1](dout, q, k, v, out, lse, bounds, 1024, **options)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for inputs, wanted in zip((qkv, other), expected, strict=True):
        buffer.copy_(inputs)
        graph.replay()
        gradients = torch.cat([wanted[name] for name in ("dq", "dk", "dv")], dim=1)
        for result, true in zip(results, (wanted["out"], wanted["lse"], gradients), strict=True):
            assert torch.equal(result, true)
