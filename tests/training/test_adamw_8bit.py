"""The 8-bit AdamW that does not wait gives bitsandbytes' results to the last bit."""

import pytest
import torch


@pytest.mark.gpu
def test_equals_bitsandbytes_to_the_last_bit() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from slothcore.training.adamw_8bit import AdamW8bit

    shapes = [(16, 4096), (4096, 16), (333, 77), (100,)]
    start = [torch.randn(shape, device="cuda") for shape in shapes]
    results = []
    for optimizer_class in (bitsandbytes.optim.AdamW8bit, AdamW8bit):
        parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = optimizer_class(parameters, lr=1e-2, weight_decay=0.1)
        generator = torch.Generator("cuda").manual_seed(1)
        for _ in range(6):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, device="cuda", generator=generator)
            optimizer.step()
        states = [optimizer.state[parameter] for parameter in parameters]
        results.append((parameters, states))
    (expected, expected_states), (actual, actual_states) = results
    for mine, theirs, state, expected_state in zip(actual, expected, actual_states, expected_states, strict=True):
        assert torch.equal(mine, theirs)
        assert state.keys() == expected_state.keys()
        for key, value in expected_state.items():
            assert torch.equal(state[key], value) if isinstance(value, torch.Tensor) else state[key] == value


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu() -> None:
    pytest.importorskip("bitsandbytes")
    from slothcore.training.adamw_8bit import AdamW8bit

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
