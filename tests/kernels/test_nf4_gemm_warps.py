"""What can be said of the specialised warps without their GPU: that this Triton compiles them for it, and they fit."""

import pytest

from slothcore.kernels.gpu import has_gluon
from tests.kernels.for_hopper import found_by

LARGEST_SHARED_MEMORY = 227 * 1024
"""Of a program on an H100."""

SCRIPT = """
from slothcore.kernels import nf4_eager, nf4_gemm_group

nf4_gemm_group.multiprocessors = lambda device: 132
nf4_gemm_group._flags_for = lambda device: torch.zeros(264, dtype=torch.int32)
for backward in (False, True):
    weights = [nf4_eager.nf4_quantize(torch.ones(256, 512)) for _ in range(2)]
    left, out = torch.ones(8, 512), torch.ones(8, 512)
    factors = (torch.ones(8, 16), torch.ones(16, 512) if backward else torch.ones(512, 16))
    tensors = [t.bfloat16() for t in (left, *factors)]
    bias = None if backward else torch.ones(512).bfloat16()
    nf4_gemm_group._launch(tensors[0], weights, *tensors[1:], bias, out.bfloat16(), backward=backward)
    kernel = compiled.pop()
    found.append([kernel.metadata.shared, kernel.asm["ptx"].count("wgmma.mma_async"), len(kernel.asm["cubin"])])
"""


@pytest.mark.slow
@pytest.mark.skipif(not has_gluon(), reason="this Triton has no Gluon")
def test_kernel_compiles_for_hopper_and_fits_its_shared_memory() -> None:
    found = found_by(SCRIPT)
    assert len(found) == 2
    for shared, products, size in found:
        assert shared <= LARGEST_SHARED_MEMORY
        assert products >= 8, "64 summands are four instructions of each consumer"
        assert size > 0
