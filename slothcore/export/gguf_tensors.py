"""A model's weights as the tensors of a GGUF file: their names there, their order of rows, and what is added to them.

Hugging Face's RoPE turns channel i of a head together with channel i + D/2, llama.cpp's of the Llama family channel 2i
with 2i + 1. Rows of q and k are reordered for that, which changes no score. Gemma's norms hold w + 1 in the file.

    D  head_dim    E  experts
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slothcore.export.gguf_architecture import Architecture, architecture, query_factor
from slothcore.layers.experts import stack_path
from slothcore.layers.rope import RopeParameters, inverse_frequencies
from slothcore.models.config import DecoderConfig

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
IN_SANDWICH_LAYER = {
    **IN_LAYER,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


class Layout:
    """How the weights of one model lie in its file.

    Attributes:
        architecture: llama.cpp's.
    """

    def __init__(self, config: DecoderConfig, *, tied: bool) -> None:
        """Raises: ValueError if llama.cpp computes no such model."""
        self.config = config
        self.architecture: Architecture = architecture(config, tied=tied)
        self._query_factor = query_factor(config)
        self._in_layer = dict(IN_SANDWICH_LAYER if config.sandwich_norms else IN_LAYER)
        if config.moe is not None:
            block = config.moe.block_name
            self._in_layer[f"{block}.gate"] = "ffn_gate_inp"
            for theirs, name in zip(("gate", "up", "down"), config.moe.expert_names, strict=True):
                self._in_layer[f"{block}.experts.{name}"] = f"ffn_{theirs}_exps"

    def name(self, path: str) -> str:
        """GGUF's name of a module, without ".weight"; of a stack of experts, all of them."""
        if path in OUTER:
            return OUTER[path]
        index, _, rest = path.removeprefix("model.layers.").partition(".")
        return f"blk.{index}.{self._in_layer[rest]}"

    def to_file(self, name: str, weight: Tensor) -> Tensor:
        """A weight, bias or LoRA B as the file has it, in its dtype.

        Args:
            name: of the parameter, as Hugging Face calls it. Of a LoRA term only B has rows of the output.
        """
        last = name.split(".")[-2]
        if last in ("q_proj", "k_proj") and self.architecture.rope_pairs:
            weight = self._rows(weight, 2, -1).transpose(-3, -2).reshape(weight.shape)
        if last.endswith("norm") and self.config.norm_weight_offset:
            weight = weight + self.config.norm_weight_offset
        if self._scales_queries(last):
            weight = weight * self._query_factor
        return weight

    def from_file(self, name: str, weight: Tensor) -> Tensor:
        """The reverse of `to_file`."""
        last = name.split(".")[-2]
        if self._scales_queries(last):
            weight = weight / self._query_factor
        if last.endswith("norm") and self.config.norm_weight_offset:
            weight = weight - self.config.norm_weight_offset
        if last in ("q_proj", "k_proj") and self.architecture.rope_pairs:
            weight = self._rows(weight, -1, 2).transpose(-3, -2).reshape(weight.shape)
        return weight

    def _rows(self, weight: Tensor, first: int, second: int) -> Tensor:
        """The rows of each head as a grid, [heads, first, second, columns]."""
        return weight.reshape(weight.shape[0] // self.config.head_dim, first, second, *(weight.shape[1:] or (1,)))

    def _scales_queries(self, last: str) -> bool:
        """Whether this is what makes queries large or small: their norm, or the projection where they have none."""
        return self._query_factor != 1 and last == ("q_norm" if self.config.qk_norm else "q_proj")


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file.

    Attributes:
        name: in the file.
        shape: of the whole, E first.
        sources: Hugging Face's names of the weights that it is made of: one, or a stack's experts in order.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]


def file_tensors(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> list[FileTensor]:
    """All tensors that weights are in, in the weights' order.

    Args:
        shapes: of each weight of the model, by Hugging Face's name.
    """
    found: dict[str, FileTensor] = {}
    for source, shape in shapes.items():
        path, _, attribute = source.rpartition(".")
        stack = stack_path(path)
        name = f"{layout.name(path if stack is None else stack[0])}.{attribute}"
        if stack is None:
            found[name] = FileTensor(name, shape, (source,))
        else:
            sources = (*found[name].sources, source) if name in found else (source,)
            found[name] = FileTensor(name, (len(sources), *shape), sources)
    return list(found.values())


def rope_factors(config: DecoderConfig) -> dict[str, Tensor]:
    """What each pair's frequency is divided by, float32, where the type of RoPE is no key of the file."""
    rope = config.rope
    if rope.rope_type == "llama3":
        plain = RopeParameters(rope_theta=rope.rope_theta)
        factors = inverse_frequencies(plain, config.head_dim) / inverse_frequencies(rope, config.head_dim)
        return {"rope_freqs.weight": factors}
    if rope.rope_type == "longrope":
        named = {"long": rope.long_factor, "short": rope.short_factor}
        return {f"rope_factors_{name}.weight": torch.tensor(factors) for name, factors in named.items()}
    return {}
