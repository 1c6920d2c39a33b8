"""What can be said of the specialised warps without their GPU: that this Triton compiles them for it, and they fit."""

import pytest

from slothcore.kernels.gpu import has_gluon
from tests.kernels.compiled_for import found_by

LARGEST_SHARED_MEMORY = 227 * 1024
"""Of a program on an H100."""

SCRIPT = """
from slothcore.kernels import nf4_eager, nf4_gemm_group
from slothcore.kernels.nf4_few_eager import Terms

nf4_gemm_group.multiprocessors = lambda device: 132
nf4_gemm_group._flags_for = lambda device: torch.zeros(264, dtype=torch.int32)
weights = [nf4_eager.nf4_quantize(torch.ones(256, 512)) for _ in range(2)]
# Tiles of many tokens and of few, each with factors that are joined; of few with factors apart.
kinds = (300, False, False), (300, True, False), (8, False, False), (8, True, False), (8, False, True)
for rows, backward, apart in kinds:
    left, out, u = (torch.ones(rows, n).bfloat16() for n in (512, 512, 32))
    joined = None if apart else (torch.ones(32, 512) if backward else torch.ones(512, 32)).bfloat16()
    terms = Terms(u, [torch.ones(256, 16)] * 2, [0.5, 2.0], [None] * 2) if apart else None
    bias = None if backward or apart else torch.ones(512).bfloat16()
    nf4_gemm_group._launch(left, weights, u, joined, bias, out, backward=backward, apart=terms)
    kernel = compiled.pop()
    found.append([kernel.metadata.shared, kernel.asm["ptx"].count("wgmma.mma_async"), len(kernel.asm["cubin"])])
"""


@pytest.mark.slow
@pytest.mark.skipif(not has_gluon(), reason="this Triton has no Gluon")
def test_kernel_compiles_for_hopper_and_fits_its_shared_memory() -> None:
    found = found_by(SCRIPT)
    assert len(found) == 5
    for shared, products, size in found:
        assert shared <= LARGEST_SHARED_MEMORY
        assert products >= 8, "64 summands are four instructions of each consumer"
        assert size > 0
