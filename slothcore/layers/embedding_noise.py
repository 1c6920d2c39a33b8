"""NEFTune: noise on the embeddings of a training pass.

For a document of L tokens and hidden size d, each element of each embedding gets e * alpha / sqrt(L d), with e uniform
in [-1, 1), so that the expected squared length of the noise on a document is alpha^2 / 3 whatever its length.
"""

import torch
from torch import Tensor

from slothcore.layers.packed import Documents


def add_embedding_noise(embedded: Tensor, documents: Documents, *, alpha: float) -> Tensor:
    """Embeddings with noise, as a new tensor.

    The noise is drawn from torch's default generator of the device, in float32, and so is the sum before it is rounded;
    the host waits for nothing.

    Args:
        embedded: [T, H], scaled already where a model scales its embeddings, as transformers has it.
        documents: whose lengths they are; all T tokens belong to one.
    Returns: [T, H], the dtype of embedded.
    Source: Jain et al. 2023, arXiv:2310.05914.
    """
    tokens, hidden_size = embedded.shape
    lengths = documents.cu_seqlens.diff()
    # With output_size, which the host knows, the device need not be asked.
    own = torch.repeat_interleave(lengths, lengths, output_size=tokens)
    magnitude = alpha * (own * hidden_size).float().rsqrt()
    noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1.0, 1.0).mul_(magnitude[:, None])
    return (embedded + noise).to(embedded.dtype)
