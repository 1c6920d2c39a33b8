"""Token ids to hidden states: the embedding, the layers and the final norm.

T  tokens, packed    H  hidden_size
"""

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slothcore.layers.embedding_noise import add_embedding_noise
from slothcore.layers.kv_cache import KvCache
from slothcore.layers.offload import ActivationOffload
from slothcore.layers.packed import Documents
from slothcore.layers.rope import RotaryEmbedding
from slothcore.models.config import DecoderConfig
from slothcore.models.decoder_layer import DecoderLayer, make_norm

GradientCheckpointing = bool | Literal["mlp", "offload"]
"""What a training pass does not keep on the device; see `DecoderBody.gradient_checkpointing`."""


class DecoderBody(nn.Module):
    """Embedding, layers and the final norm: token ids to hidden states."""

    def __init__(self, config: DecoderConfig, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device),
            freeze=False,
            # As in transformers, a real token with this id gives no gradient. Some files say -1 for "none".
            padding_idx=None if (config.pad_token_id or 0) < 0 else config.pad_token_id,
        )
        # HF rounds the scale to the weight dtype (55.43 -> 55.5 in bfloat16); a 0-dim CPU tensor multiplies anywhere.
        scale = config.embedding_scale
        self.embedding_scale: Tensor | None = None
        if scale != 1.0:
            self.embedding_scale = torch.tensor(scale, dtype=dtype, device="cpu")
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, dtype=dtype, device=device) for i in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config, config.hidden_size, dtype=dtype, device=device)
        self.rotary_emb = RotaryEmbedding(config.rope, config.head_dim)
        self.rotary_emb_local: RotaryEmbedding | None = None
        if config.local_rope is not None:
            self.rotary_emb_local = RotaryEmbedding(config.local_rope, config.head_dim)
        self.neftune_noise_alpha: float | None = None  # of NEFTune, in training passes; None: no noise
        self._gradient_checkpointing: GradientCheckpointing = False
        self._offload: ActivationOffload | None = None

    @property
    def gradient_checkpointing(self) -> GradientCheckpointing:
        """What a training pass does not keep on the device for its backward pass.

        False      everything is kept
        True       only the input of each layer is kept, and the layer runs again
        "mlp"      gate and up of each gated MLP are multiplied again from its input
        "offload"  as "mlp", and what else is kept waits in host memory
        """
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, mode: GradientCheckpointing) -> None:
        if not (isinstance(mode, bool) or mode in ("mlp", "offload")):
            raise ValueError(f'gradient_checkpointing must be False, True, "mlp" or "offload", got {mode!r}')
        self._gradient_checkpointing = mode
        self._offload = ActivationOffload() if mode == "offload" else None
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.keep_gate_up = isinstance(mode, bool)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        documents: Documents,
        cache: KvCache | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states [T, H] after the final norm, for input_ids and position_ids [T].

        `router_logits` is filled with those of the sparse layers, if they keep them.
        """
        # A token that continues a cached row has its document in the cache, not in this pass.
        boundaries = documents.cu_seqlens if cache is None or cache.is_prompt or cache.is_chunk else None
        angles = local_angles = self.rotary_emb(position_ids, boundaries)
        if self.rotary_emb_local is not None:
            local_angles = self.rotary_emb_local(position_ids, boundaries)
        # An embedding that trains may be float32 in a model of 16 bits, which computes with what it rounds to.
        branch: Tensor = self.embed_tokens(input_ids).to(self.norm.weight.dtype)
        if self.embedding_scale is not None:
            branch = branch * self.embedding_scale
        residual: Tensor | None = None
        learns = torch.is_grad_enabled()
        if self.neftune_noise_alpha is not None and self.training and learns:
            branch = add_embedding_noise(branch, documents, alpha=self.neftune_noise_alpha)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            inputs = branch, residual, local_angles if layer.is_local else angles, documents
            if self._gradient_checkpointing is True and learns:
                branch, residual, routed = checkpoint(
                    layer, *inputs, use_reentrant=False, preserve_rng_state=layer.draws_random_numbers()
                )
            else:
                with nullcontext() if self._offload is None or not learns else self._offload.layer(index):
                    branch, residual, routed = layer(*inputs, None if cache is None else cache.layer(index))
            if routed is not None and router_logits is not None:
                router_logits.append(routed)
        return self.norm(branch, residual)[0]
