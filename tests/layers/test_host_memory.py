"""Slabs of host memory, and the copies on a stream of their own."""

import pytest
import torch

from slothcore.layers.host_memory import LARGEST_SLAB, SMALLEST_SLAB, CudaTransfer, HostMemory

MIB = 2**20


def counted() -> tuple[HostMemory, list[int]]:
    """Host memory that only notes what it allocates."""
    sizes: list[int] = []

    def allocate(nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")

    return HostMemory(allocate), sizes


def test_regions_do_not_overlap_and_have_the_size_asked_for() -> None:
    memory = HostMemory(lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8))
    regions = [memory.take(nbytes) for nbytes in (1, 511, 512, 513, 100_000)]
    for value, region in enumerate(regions, start=1):
        region.bytes.fill_(value)
    for value, (region, nbytes) in enumerate(zip(regions, (1, 511, 512, 513, 100_000), strict=True), start=1):
        assert len(region.bytes) == nbytes
        assert bool((region.bytes == value).all())
        assert region.bytes.data_ptr() % 64 == regions[0].bytes.data_ptr() % 64


def test_slabs_grow_with_what_there_is_up_to_a_limit() -> None:
    memory, sizes = counted()
    regions = [memory.take(64 * MIB) for _ in range(80)]
    assert sizes == [64 * MIB, 64 * MIB, 128 * MIB, 256 * MIB, 512 * MIB, *[LARGEST_SLAB] * 4]
    assert memory.nbytes == sum(sizes) == 5 * 1024 * MIB == len(regions) * 64 * MIB


def test_a_region_larger_than_a_slab_gets_one_of_its_own() -> None:
    memory, sizes = counted()
    regions = [memory.take(3 * LARGEST_SLAB), memory.take(1)]
    assert sizes == [4 * LARGEST_SLAB]
    assert [len(region.bytes) for region in regions] == [3 * LARGEST_SLAB, 1]


def test_a_slab_starts_again_when_all_of_it_came_back() -> None:
    memory, sizes = counted()
    for _ in range(3):
        regions = [memory.take(SMALLEST_SLAB // 4) for _ in range(4)]
        del regions[0]
        regions.append(memory.take(1))  # the slab is full, and partly in use: another one
        assert sizes == [SMALLEST_SLAB, SMALLEST_SLAB]
        del regions


@pytest.mark.gpu
def test_bytes_go_to_the_host_and_back() -> None:
    transfer = CudaTransfer()
    memory = HostMemory(transfer.host_memory)
    expected = torch.arange(3 * MIB, device="cuda").to(torch.uint8)
    for _ in range(5):
        source, region = expected.clone(), memory.take(3 * MIB)
        out = transfer.copy(source, region.bytes)
        out.wait()
        source.zero_()  # after the copy, since it was waited for
        target = torch.empty_like(expected)
        transfer.copy(region.bytes, target).wait()
        assert torch.equal(target, expected)
    assert memory.nbytes == SMALLEST_SLAB
    assert region.bytes.is_pinned()
