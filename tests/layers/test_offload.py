"""Activations that leave the device: same gradients, bounded memory, nothing left behind, nothing wrong in silence."""

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.multiprocessing.reductions import StorageWeakRef

from slothcore.autograd.glu import glu
from slothcore.layers.offload import ActivationOffload
from tests.layers.late_transfer import LateTransfer

SIZE = 1024  # float32 elements of a tensor that travels
NBYTES = 4 * SIZE


class Keeps(Function):
    """y = x; keeps `tensors` for backward, where it gives them to `reads`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reads: Callable[..., None], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.reads = reads
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.reads(*ctx.saved_tensors)
        return (grad, None, *[None] * len(ctx.saved_tensors))


def offload_with(**options: Any) -> tuple[ActivationOffload, LateTransfer]:
    transfer = LateTransfer()
    return ActivationOffload(**{"keep_last": 0, "min_bytes": NBYTES // 2, "transfer": transfer} | options), transfer


def one(**options: Any) -> Tensor:
    return torch.ones((), requires_grad=True, **options)


def ignore(*tensors: Tensor) -> None:
    pass


def forward(
    offload: ActivationOffload,
    layers: Sequence[Sequence[Tensor]],
    reads: Callable[..., None] = ignore,
    x: Tensor | None = None,
) -> Tensor:
    """A pass whose layers keep these tensors, each in an operation of its own, and let go of them otherwise."""
    y = one() if x is None else x
    for index, tensors in enumerate(layers):
        with offload.layer(index):
            for tensor in tensors:
                y = Keeps.apply(y, reads, tensor)
    return y


def numbered(value: int) -> Tensor:
    return torch.full((SIZE,), float(value))


# ---------------------------------------------------------------- what comes back


def test_values_come_back_and_the_device_holds_one_layer() -> None:
    offload, transfer = offload_with()
    seen: list[int] = []

    def reads(tensor: Tensor) -> None:
        assert bool((tensor == tensor[0]).all())
        seen.append(int(tensor[0]))
        assert transfer.held() <= 3 * NBYTES

    y: Tensor = one()
    for index in range(6):
        with offload.layer(index):
            for part in range(2):
                y = Keeps.apply(y, reads, numbered(2 * index + part))
                assert transfer.held() <= (2 if index else 3) * NBYTES
    y.backward()
    assert seen == list(reversed(range(12)))
    # The last layer was still there: the window is a layer.
    assert transfer.out == [NBYTES] * 12
    assert transfer.into == [NBYTES] * 10
    assert transfer.faults == []


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda t: t.view(32, 32).t(), id="transposed"),
        pytest.param(lambda t: t.view(4, 16, 16).permute(2, 0, 1), id="permuted"),
        pytest.param(lambda t: t.view(torch.float16).view(64, 32), id="another dtype"),
        pytest.param(lambda t: t.view(32, 32)[:, 4:28], id="columns"),
        pytest.param(lambda t: t[5:901], id="with an offset"),
        pytest.param(lambda t: t.view(64, 1, 16).expand(64, 3, 16), id="expanded"),
        pytest.param(lambda t: t.view(64, 16)[:, None], id="a dimension of one"),
    ],
)
def test_layouts_come_back(make: Callable[[Tensor], Tensor]) -> None:
    offload, transfer = offload_with(resident_layers=1e-9)
    kept = make(torch.randn(SIZE))
    expected, stride = kept.clone(), kept.stride()
    found: list[Tensor] = []
    y = forward(offload, [[kept], [numbered(0)], [numbered(1)]], lambda *tensors: found.extend(tensors))
    del kept
    y.backward()
    assert transfer.into == [NBYTES, transfer.out[0]]
    back = found[-1]
    assert (back.stride(), back.dtype) == (stride, expected.dtype)
    as_bits = torch.int32 if back.element_size() == 4 else torch.int16  # random halves may be NaN
    assert torch.equal(back.contiguous().view(as_bits), expected.contiguous().view(as_bits))


def test_a_slice_of_something_much_larger_stays() -> None:
    offload, transfer = offload_with()
    wide = torch.randn(SIZE, 8)
    found: list[Tensor] = []
    forward(offload, [[wide[:, 1]], [wide[:, 2]]], lambda *t: found.extend(t)).backward()
    assert transfer.out == []
    assert all(torch.equal(back, wide[:, column]) for back, column in zip(found, (2, 1), strict=True))


def test_small_tensors_stay() -> None:
    offload, transfer = offload_with(min_bytes=NBYTES)
    forward(offload, [[torch.ones(SIZE - 1), numbered(1)], []]).backward()
    assert transfer.out == [NBYTES]


# ---------------------------------------------------------------- what travels


def test_a_tensor_saved_twice_travels_once_within_a_layer_and_into_the_next() -> None:
    offload, transfer = offload_with()
    h = [numbered(value) for value in range(4)]
    found: list[int] = []
    y = forward(
        offload,
        [[h[0], h[0].detach()], [h[0], h[1], h[1].view(32, 32)], [h[1], h[2], h[2]], [h[3]], [numbered(9)]],
        lambda tensor: found.append(int(tensor.flatten()[0])),
    )
    del h
    y.backward()
    assert found == [9, 3, 2, 2, 1, 1, 1, 0, 0, 0]
    assert transfer.out == [NBYTES] * 5
    assert len(transfer.into) <= 5
    assert transfer.faults == []


def test_views_of_one_storage_travel_once() -> None:
    offload, transfer = offload_with()
    qkv = torch.randn(32, 64)
    q, k, v = qkv.split((32, 16, 16), dim=1)
    expected = [part.clone() for part in (v, k, q, qkv)]
    found: list[Tensor] = []
    y = forward(offload, [[qkv, q, k, v], [numbered(1), numbered(2)], [numbered(3), numbered(4)]], found.append)
    assert transfer.out[0] == 2 * NBYTES
    assert len(transfer.out) == 5
    strides = [part.stride() for part in (v, k, q, qkv)]
    del qkv, q, k, v
    y.backward()
    for back, want, stride in zip(found[4:], expected, strides, strict=True):
        assert torch.equal(back, want)
        assert back.stride() == stride


def test_a_slice_saved_before_the_whole_brings_the_whole_along() -> None:
    offload, transfer = offload_with()
    qkv = torch.randn(32, 64)
    forward(offload, [[qkv[:, :32], qkv[:, 32:48], qkv], []]).backward()
    assert transfer.out == [2 * NBYTES]


def test_parts_whose_elements_straddle_those_of_the_whole_travel_apart() -> None:
    offload, transfer = offload_with()
    memory = torch.randint(0, 100, (NBYTES,), dtype=torch.uint8)
    found: list[Tensor] = []
    y = forward(offload, [[memory[2:], memory[4:].view(torch.int32)], [], [numbered(1)]], found.append)
    expected = memory.clone()
    del memory
    y.backward()
    assert transfer.out == [NBYTES - 2, NBYTES - 4, NBYTES]
    assert torch.equal(found[2], expected[2:])
    assert torch.equal(found[1], expected[4:].view(torch.int32))


def test_the_same_memory_with_new_contents_travels_again() -> None:
    offload, transfer = offload_with()
    found: list[float] = []
    memory, old = numbered(1), one()
    with offload.layer(0):
        old = Keeps.apply(old, ignore, memory)
        memory.add_(1)
        new = Keeps.apply(one(), lambda tensor: found.append(tensor[0].item()), memory)
    assert len(transfer.out) == 2
    new.backward()
    assert found == [2.0]
    with pytest.raises(RuntimeError, match="in-place"):
        old.backward()


@pytest.mark.parametrize("trains", [True, False])
def test_parameters_and_leaves_stay_and_so_do_their_views(trains: bool) -> None:
    offload, transfer = offload_with()
    weight = nn.Parameter(torch.randn(32, 32), requires_grad=trains)
    leaf = torch.randn(SIZE, requires_grad=True)
    x = torch.randn(3, 32, requires_grad=True)
    with offload.layer(0):
        y = nn.functional.linear(x, weight)
        y = Keeps.apply(y, ignore, weight, weight.t(), weight.detach().t() if trains else weight, leaf, leaf[3:])
    y.sum().backward()
    assert len(transfer.out) == trains  # only the detached one cannot be told
    assert torch.equal(x.grad, torch.ones(3, 32) @ weight.detach())


# ---------------------------------------------------------------- changes in place


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_tensor_changed_after_it_was_saved_raises(after: int) -> None:
    """Directly, in the next layer, or long after its memory was given back."""
    offload, _ = offload_with(resident_layers=1e-9)
    h = numbered(1)
    y: Tensor = one()
    for index in range(5):
        with offload.layer(index):
            y = Keeps.apply(y, ignore, h if index == 0 else numbered(index))
            if index == after:
                h.view(-1)[:3].add_(1)
    with pytest.raises(
        RuntimeError, match=r"\(1024,\) torch.float32 tensor .* at version 1, and was saved at version 0"
    ):
        y.backward()


def test_a_small_tensor_changed_after_it_was_saved_raises_too() -> None:
    offload, _ = offload_with()
    small = torch.ones(3)
    y = forward(offload, [[small]])
    small.add_(1)
    with pytest.raises(RuntimeError, match="in-place operation"):
        y.backward()


def test_a_backward_that_overwrites_what_it_saved_spoils_no_other_user() -> None:
    """glu(inplace=True) replaces the kept tensor by its gradient; another operation needs its values afterwards."""
    gate_up = torch.randn(16, 2 * 32, requires_grad=True)

    def run(offload: ActivationOffload | None) -> Tensor:
        source = gate_up * 1.0
        layers = offload or ActivationOffload(transfer=LateTransfer(), min_bytes=2**40)
        with layers.layer(0):
            y = source.sin().sum() + glu(source, activation="silu", inplace=offload is not None).sum()
        del source
        for index in (1, 2):
            with layers.layer(index):
                y = Keeps.apply(y, ignore, numbered(index))
        (grad,) = torch.autograd.grad(y, gate_up, retain_graph=True)
        (again,) = torch.autograd.grad(y, gate_up)
        assert torch.equal(grad, again)
        return grad

    offload, transfer = offload_with(min_bytes=1024)
    expected = run(None)
    assert torch.equal(run(offload), expected)
    assert transfer.faults == []


def test_a_second_backward_through_an_overwritten_tensor_that_stayed_raises() -> None:
    offload, _ = offload_with(num_layers=1, keep_last=1, min_bytes=1024)
    gate_up = torch.randn(16, 64, requires_grad=True)
    with offload.layer(0):
        y = glu(gate_up * 1.0, activation="silu", inplace=True).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="in-place"):
        y.backward()


# ---------------------------------------------------------------- the last layers


def test_the_last_layers_stay_where_they_are() -> None:
    offload, transfer = offload_with(num_layers=4, keep_last=2)
    forward(offload, [[numbered(index)] for index in range(4)]).backward()
    assert len(transfer.out) == len(transfer.into) == 2


def test_the_number_of_layers_is_learned_from_a_pass_with_a_backward() -> None:
    offload, transfer = offload_with(keep_last=1)
    layers = [[numbered(index)] for index in range(4)]
    forward(offload, layers).backward()
    assert len(transfer.out) == 4
    forward(offload, layers[:2])  # a pass that ends early teaches nothing
    forward(offload, layers).backward()
    assert len(transfer.out) == 4 + 2 + 3


def test_a_tensor_of_every_layer_travels_once() -> None:
    """As the angles of the rotary positions do."""
    offload, transfer = offload_with(num_layers=6, keep_last=1)
    angles = torch.randn(SIZE // 2)
    found: list[bool] = []
    expected = angles.clone()
    y = forward(
        offload,
        [[angles, numbered(index)] for index in range(6)],
        lambda tensor: found.append(len(tensor) == SIZE or torch.equal(tensor, expected)),
    )
    del angles
    y.backward()
    assert transfer.out.count(NBYTES // 2) == 1
    assert transfer.into.count(NBYTES // 2) == 0
    assert all(found)
    assert len(found) == 12


# ---------------------------------------------------------------- order and memory


def test_fetches_run_ahead_in_the_order_of_backward() -> None:
    """Layer i saves sizes that tell it; when a layer's first tensor is read, the rest of its window is under way."""
    offload, transfer = offload_with()
    fetched_by: list[int] = []
    y: Tensor = one()
    for index in range(5):
        with offload.layer(index):
            for part in range(3):
                tensor = torch.ones(SIZE + 8 * index + part)
                y = Keeps.apply(y, lambda tensor: fetched_by.append(len(transfer.into)), tensor)
    del tensor
    y.backward()
    sizes = [4 * (SIZE + 8 * index + part) for index in range(5) for part in range(3)]
    assert transfer.out == sizes
    # What the last window holds is there; of the rest each is asked for once, last saved first.
    resident = len(sizes) - len(transfer.into)
    assert transfer.into == sizes[: len(sizes) - resident][::-1]
    assert 2 <= resident <= 3
    ahead = [count + resident - 1 - read for read, count in enumerate(fetched_by)][:-3]
    assert min(ahead[1:]) >= 1, "a tensor was only asked for when it was needed"
    assert max(ahead) <= 2, "more than a layer was asked for"


def test_a_wider_window_holds_more() -> None:
    narrow, wide = (offload_with(resident_layers=layers) for layers in (1, 3))
    for offload, transfer in (narrow, wide):
        most = 0

        def reads(tensor: Tensor, transfer: LateTransfer = transfer) -> None:
            nonlocal most
            most = max(most, transfer.held())

        forward(offload, [[numbered(index)] for index in range(8)], reads).backward()
        assert transfer.faults == []
        assert most == (1 if offload is narrow[0] else 3) * NBYTES


def test_the_window_is_that_of_the_pass_not_of_a_longer_one_before() -> None:
    offload, transfer = offload_with()
    forward(offload, [[torch.ones(8 * SIZE)] for _ in range(4)]).backward()
    y = forward(offload, [[numbered(index)] for index in range(4)])
    assert transfer.held() == NBYTES
    y.backward()


def test_steps_reuse_host_memory() -> None:
    offload, transfer = offload_with()
    layers = [[torch.empty(2**22) for _ in range(3)] for _ in range(5)]
    for _ in range(3):
        forward(offload, layers).backward()
        assert transfer.slabs == 3  # 64 + 64 + 128 MiB for 240
    assert offload.host_bytes == 256 * 2**20


def test_memory_that_was_sent_is_free() -> None:
    offload, _ = offload_with()
    tensor = numbered(1)
    storage = StorageWeakRef(tensor.untyped_storage())
    y = forward(offload, [[tensor], [numbered(2)]])
    assert not storage.expired()
    del tensor
    gc.collect()
    assert storage.expired(), "the memory of a tensor that left is still held"
    y.backward()


def test_a_pass_without_backward_leaves_nothing_behind() -> None:
    offload, transfer = offload_with()
    y = forward(offload, [[numbered(index)] for index in range(6)])
    assert transfer.held() > 0
    del y
    assert transfer.held() == 0
    for _ in range(3):
        forward(offload, [[torch.empty(2**23), torch.empty(2**23)]])
    assert transfer.slabs == 1, "host memory of a dropped pass was not given back"
    assert transfer.faults == []


@pytest.mark.parametrize("resident_layers", [1, 3])
def test_an_exception_in_forward_or_backward_leaves_nothing_behind(resident_layers: int) -> None:
    """Nor does a copy that was under way write where others have their memory by now."""
    offload, transfer = offload_with(resident_layers=resident_layers)

    def fails(tensor: Tensor) -> None:
        if tensor[0] == 2:
            raise ArithmeticError("layer 2")

    y = forward(offload, [[numbered(index)] for index in range(6)], fails)
    with pytest.raises(ArithmeticError):
        y.backward()
    del y

    def forward_fails() -> None:
        with offload.layer(0):
            Keeps.apply(one(), ignore, numbered(0))
            raise ArithmeticError("layer 0")

    with pytest.raises(ArithmeticError):
        forward_fails()
    gc.collect()
    assert transfer.held() == 0
    assert transfer.faults == []
    found: list[int] = []
    forward(offload, [[numbered(index)] for index in range(6)], lambda tensor: found.append(int(tensor[0]))).backward()
    assert found == [5, 4, 3, 2, 1, 0]
    assert transfer.faults == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_passes_may_wait_for_their_backward(order: tuple[int, int]) -> None:
    offload, transfer = offload_with(keep_last=1)
    found: list[int] = []
    passes = [
        forward(offload, [[numbered(10 * n + i)] for i in range(4)], lambda tensor: found.append(int(tensor[0])))
        for n in range(2)
    ]
    for n in order:
        passes[n].backward()
    assert found == [10 * n + i for n in order for i in reversed(range(4))]
    del passes
    assert transfer.held() == 0
    assert transfer.faults == []


def test_a_gradient_of_the_last_layers_only() -> None:
    offload, transfer = offload_with()
    found: list[int] = []
    middle = one()
    x = one()
    y = x
    for index in range(6):
        with offload.layer(index):
            y = Keeps.apply(y, lambda tensor: found.append(int(tensor[0])), numbered(index))
        if index == 3:
            middle = y
    torch.autograd.grad(y, middle, retain_graph=True)
    assert found == [5, 4]
    torch.autograd.grad(y, x)
    assert found == [5, 4, 5, 4, 3, 2, 1, 0]
    del y, middle
    assert transfer.held() == 0
    assert transfer.faults == []


def test_nothing_happens_without_gradients_or_without_cuda() -> None:
    offload, transfer = offload_with()
    with torch.no_grad():
        forward(offload, [[numbered(index)] for index in range(3)])
    assert transfer.out == []
    plain = ActivationOffload(min_bytes=1)
    x = torch.randn(64, requires_grad=True)
    with plain.layer(0):
        y = (x * 2).exp()
    y.sum().backward()
    assert torch.equal(x.grad, 2 * (2 * x).exp())
    assert plain.host_bytes == 0


@pytest.mark.parametrize("option", [{"keep_last": -1}, {"resident_layers": 0.0}, {"min_bytes": 0}])
def test_options_out_of_range_raise(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        ActivationOffload(**option)


def test_a_copy_has_no_host_memory_yet() -> None:
    """As of a model that is copied after training steps."""
    offload, transfer = offload_with()
    forward(offload, [[torch.ones(SIZE)], [torch.ones(SIZE)]]).backward()
    assert offload.host_bytes > 0
    other = copy.deepcopy(offload)
    assert other.host_bytes == 0
    forward(other, [[torch.ones(SIZE)], [torch.ones(SIZE)]]).backward()
    assert len(transfer.out) == 4
