"""The 8-bit AdamW that takes many parameters at once gives bitsandbytes' results to the last bit.

bitsandbytes has the update for GPUs alone. On the CPU both sides call the same stand-in, blockwise as the original, so
what is tested there is how parameters and states are laid together; on a GPU it is the original.
"""

import pytest
import torch

from slothcore.models.flat_factors import FlatFactors, factors_apart, is_factor_b
from slothcore.training import adamw_8bit
from slothcore.training.adamw_8bit import AdamW8bit, end_to_end
from slothcore.training.optimizer import load_optimizer_state, optimizer_state

bitsandbytes = pytest.importorskip("bitsandbytes")
SHAPES = [(16, 256), (256, 32), (333, 77), (100,), (64, 64), (16, 512)]


def blockwise_update(
    name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr, qmap1, qmap2, absmax1, absmax2, decay, **_
) -> None:
    """8-bit Adam in plain torch: each block of 256 elements is decoded, updated and coded again by its own maximum."""

    def decode(codes, absmax, qmap):
        return qmap[codes.reshape(-1).long()] * absmax.repeat_interleave(256)[: codes.numel()]

    def encode(values, codes, absmax, qmap):
        padded = torch.nn.functional.pad(values, (0, -len(values) % 256)).view(-1, 256)
        absmax.copy_(padded.abs().amax(1))
        scaled = values / absmax.repeat_interleave(256)[: len(values)].clamp(min=1e-30)
        codes.copy_((scaled[:, None] - qmap).abs().argmin(1).view(codes.shape))

    gradient = g.reshape(-1)
    first = beta1 * decode(state1, absmax1, qmap1) + (1 - beta1) * gradient
    second = beta2 * decode(state2, absmax2, qmap2) + (1 - beta2) * gradient * gradient
    rate = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    p.mul_(1 - lr * decay).sub_((rate * first / (second.sqrt() + eps)).view(p.shape))
    encode(first, state1, absmax1, qmap1)
    encode(second, state2, absmax2, qmap2)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(bitsandbytes.functional, "optimizer_update_8bit_blockwise", blockwise_update)
        monkeypatch.setattr(
            bitsandbytes.functional,
            "optimizer_update_32bit",
            lambda name, g, p, state1, beta1, eps, step, lr, *_, **__: (state1.add_(g), p.sub_(lr * state1)),
        )
        monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", lambda parameter: None)
    return request.param


class Run:
    """Some parameters with an optimizer, and gradients that depend on the step alone."""

    def __init__(self, optimizer_class, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES]
        groups = [
            {"params": self.parameters[:4], "weight_decay": 0.1},
            {"params": self.parameters[4:], "weight_decay": 0.0},
        ]
        self.optimizer = optimizer_class(groups, lr=1e-2)

    def step(self, number: int, without: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(100 + number)
        for index, parameter in enumerate(self.parameters):
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.grad = None if index in without else gradient
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2 / (number + 1)
        self.optimizer.step()

    def named(self) -> dict[str, torch.nn.Parameter]:
        return {f"p{index}": parameter for index, parameter in enumerate(self.parameters)}

    def assert_equals(self, other: "Run") -> None:
        for mine, theirs in zip(self.parameters, other.parameters, strict=True):
            assert torch.equal(mine, theirs)
            state, expected = self.optimizer.state[mine], other.optimizer.state[theirs]
            assert state.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(state[key], value) if isinstance(value, torch.Tensor) else state[key] == value


@pytest.mark.parametrize("largest", [2**24, 5000], ids=["one batch", "several batches"])
def test_equals_bitsandbytes_to_the_last_bit(device: str, largest: int, monkeypatch) -> None:
    monkeypatch.setattr(adamw_8bit, "LARGEST_BATCH", largest)
    expected, actual = Run(bitsandbytes.optim.AdamW8bit, device), Run(AdamW8bit, device)
    # In step 2 a parameter has no gradient, so that later ones are at different steps.
    for number, without in enumerate(((), (), (1,), (), ())):
        expected.step(number, without)
        actual.step(number, without)
        actual.assert_equals(expected)


def test_a_loaded_state_is_gone_on_with(device: str) -> None:
    straight, before = Run(AdamW8bit, device), Run(AdamW8bit, device)
    for number in range(4):
        straight.step(number)
    for number in range(2):
        before.step(number)
    tensors, values = optimizer_state(before.optimizer, before.named())
    after = Run(AdamW8bit, device)
    after.step(7)  # states of its own, to be replaced
    for parameter, saved in zip(after.parameters, before.parameters, strict=True):
        parameter.data.copy_(saved.data)
    load_optimizer_state(after.optimizer, after.named(), tensors, values)
    for number in range(2, 4):
        after.step(number)
    after.assert_equals(straight)


def test_many_parameters_take_few_launches(device: str, monkeypatch) -> None:
    run, launches = Run(AdamW8bit, device), []
    original = bitsandbytes.functional.optimizer_update_8bit_blockwise
    monkeypatch.setattr(
        bitsandbytes.functional,
        "optimizer_update_8bit_blockwise",
        lambda *args, **kwargs: (launches.append(args[1].numel()), original(*args, **kwargs)),
    )
    run.step(0)
    # Two groups of whole blocks, and the one whose last block is partial.
    assert sorted(launches) == sorted([16 * 256 + 256 * 32, 333 * 77, 64 * 64 + 16 * 512])


class FlatRun(Run):
    """The same with parameters end to end, and gradients likewise."""

    def __init__(self, optimizer_class, device: str) -> None:
        super().__init__(optimizer_class, device)
        self.flat = FlatFactors(self.parameters)

    def step(self, number: int, without: tuple[int, ...] = ()) -> None:
        self.flat.zero_grad()
        generator = torch.Generator().manual_seed(100 + number)
        for index, parameter in enumerate(self.parameters):
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if index in without:
                parameter.grad = None
            else:
                parameter.grad.copy_(gradient)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2 / (number + 1)
        self.optimizer.step()
        assert self.flat.is_intact()


@pytest.mark.parametrize("largest", [2**24, 5000], ids=["one batch", "several batches"])
def test_equals_bitsandbytes_where_parameters_lie_end_to_end(device: str, largest: int, monkeypatch) -> None:
    monkeypatch.setattr(adamw_8bit, "LARGEST_BATCH", largest)
    expected, actual = Run(bitsandbytes.optim.AdamW8bit, device), FlatRun(AdamW8bit, device)
    for number, without in enumerate(((), (), (1,), (), ())):
        expected.step(number, without)
        actual.step(number, without)
        actual.assert_equals(expected)


def test_a_checkpoint_says_nothing_of_where_parameters_lie(device: str) -> None:
    """A state of scattered parameters is gone on with by flat ones, and the other way round."""
    kinds = Run, FlatRun
    for before_kind, after_kind in (kinds, kinds[::-1]):
        straight, before, after = Run(AdamW8bit, device), before_kind(AdamW8bit, device), after_kind(AdamW8bit, device)
        for number in range(3):
            straight.step(number)
            before.step(number)
        tensors, values = optimizer_state(before.optimizer, before.named())
        for parameter, saved in zip(after.parameters, before.parameters, strict=True):
            parameter.data.copy_(saved.data)
        load_optimizer_state(after.optimizer, after.named(), tensors, values)
        straight.step(3)
        after.step(3)
        after.assert_equals(straight)


def test_flat_parameters_take_one_launch_and_no_copy(device: str, monkeypatch) -> None:
    """However many elements: the limit is on copies."""
    monkeypatch.setattr(adamw_8bit, "LARGEST_BATCH", 5000)
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in [(16, 256), (256, 32), (16, 512)]]
    flat = FlatFactors(parameters)
    optimizer = AdamW8bit(parameters, lr=1e-2)
    updated = []
    original = bitsandbytes.functional.optimizer_update_8bit_blockwise
    monkeypatch.setattr(
        bitsandbytes.functional,
        "optimizer_update_8bit_blockwise",
        lambda *args, **kwargs: (updated.append(args[1:3]), original(*args, **kwargs)),
    )
    for _ in range(2):
        flat.zero_grad()
        flat.groups[0].gradients_vector.normal_()
        optimizer.step()
    assert len(updated) == 2
    for gradients, values in updated:
        assert gradients.data_ptr() == flat.groups[0].gradients_vector.data_ptr()
        assert values.data_ptr() == flat.groups[0].parameters_vector.data_ptr()
        assert gradients.shape == values.shape == flat.groups[0].parameters_vector.shape
    # Gradients that lie elsewhere are copied, and the values are still updated where they are.
    for parameter in parameters:
        parameter.grad = parameter.grad.clone()
    optimizer.step()
    assert updated[-1][0].data_ptr() != flat.groups[0].gradients_vector.data_ptr()
    assert updated[-1][1].data_ptr() == flat.groups[0].parameters_vector.data_ptr()


def test_groups_with_rates_of_their_own_take_a_launch_each(device: str, monkeypatch) -> None:
    """As with LoRA+: factors A and B of every layer, end to end, and biases, in three groups of the optimizer."""
    shapes = [(16, 256), (512, 16), (16, 512), (256, 16), (16, 256), (1024, 16)]
    generator = torch.Generator().manual_seed(0)
    named = {f"{i // 2}.lora_{'AB'[i % 2]}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
    named |= {f"{i}.bias": torch.randn(4096, generator=generator) for i in range(2)}
    kinds = [lambda n: n.endswith("lora_A"), is_factor_b, lambda n: n.endswith("bias")]

    def optimizer_over(kind: type, parameters: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        chosen = [[p for name, p in parameters.items() if of_kind(name)] for of_kind in kinds]
        decays = 0.1, 0.1, 0.0
        return kind([{"params": p, "weight_decay": d} for p, d in zip(chosen, decays, strict=True)], lr=1e-2)

    ours, theirs = ({n: torch.nn.Parameter(v.clone().to(device)) for n, v in named.items()} for _ in range(2))
    flat = FlatFactors([parameter for _, parameter in factors_apart(ours.items())])
    mine, expected = optimizer_over(AdamW8bit, ours), optimizer_over(bitsandbytes.optim.AdamW8bit, theirs)
    for number in range(4):
        flat.zero_grad()
        for name in named:
            gradient = torch.randn(named[name].shape, generator=generator).to(device)
            ours[name].grad.copy_(gradient)
            theirs[name].grad = gradient
        for optimizer in (mine, expected):
            for group, rate in zip(optimizer.param_groups, (1e-2, 16e-2, 3e-2), strict=True):
                group["lr"] = rate / (number + 1)
        expected.step()
        launches = []
        original = bitsandbytes.functional.optimizer_update_8bit_blockwise
        with monkeypatch.context() as patch:
            patch.setattr(
                bitsandbytes.functional,
                "optimizer_update_8bit_blockwise",
                lambda *a, launches=launches, original=original, **k: (launches.append(a[1:3]), original(*a, **k)),
            )
            mine.step()
        assert len(launches) == 3
        start = flat.groups[0].parameters_vector.data_ptr()
        for gradients, values in launches:
            assert values.data_ptr() == start, "copied"
            assert gradients.data_ptr() - flat.groups[0].gradients_vector.data_ptr() == (
                start - flat.groups[0].parameters_vector.data_ptr()
            )
            start += values.nbytes
        for name, parameter in ours.items():
            assert torch.equal(parameter, theirs[name]), name
            state = mine.state[parameter]
            for key, value in expected.state[theirs[name]].items():
                assert torch.equal(state[key], value) if isinstance(value, torch.Tensor) else state[key] == value


@pytest.mark.parametrize("laid", [False, True], ids=["scattered", "end to end"])
def test_autograd_knows_that_the_weights_are_others(device: str, laid: bool) -> None:
    """Also of parameters that are a vector for the kernel, and of those that bitsandbytes updates alone."""
    run = Run(AdamW8bit, device)
    if laid:
        FlatFactors(run.parameters)
    for number in range(2):
        before = [parameter._version for parameter in run.parameters]
        run.step(number, without=(1,))
        changed = [parameter._version > version for parameter, version in zip(run.parameters, before, strict=True)]
        assert changed == [index != 1 for index in range(len(SHAPES))]
    weight, x = run.parameters[0], torch.ones(256, requires_grad=True, device=device)
    y = weight @ x
    run.step(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_vector_ends_with_the_memory_of_its_tensors() -> None:
    whole = torch.arange(24.0)
    a, b, c = whole[:4], whole[4:16].view(3, 4), whole[16:]
    vector = end_to_end([a, b, c])
    assert vector.data_ptr() == whole.data_ptr()
    assert torch.equal(vector, whole)
    assert torch.equal(end_to_end([b, c]), whole[4:])
    assert end_to_end([a, c]) is None, "a gap"
    assert end_to_end([b, a]) is None, "another order"
    assert end_to_end([b.t(), c]) is None, "no rows"
    # Two allocations that touch, as a caching allocator gives them.
    first, second = (torch.frombuffer(bytearray(16), dtype=torch.float32) for _ in range(2))
    assert end_to_end([first, second]) is None


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu() -> None:
    parameter = torch.nn.Parameter(torch.randn(16, 4096, device="cuda"))
    optimizer = AdamW8bit([parameter], lr=1e-2)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()  # makes the state
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of GPU work
    busy = torch.cuda.Event()
    busy.record()
    optimizer.step()
    assert not busy.query(), "the step waited for earlier work"
    torch.cuda.synchronize()
