"""What an adapter is, under PEFT's names, and its `adapter_config.json`."""

import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from slothcore.lora.init_names import ALONE, LATER, REPEATABLE, check_init
from slothcore.lora.module_names import ALL_LINEAR, by_pattern, ends_with, matches, unmatched_names

TUPLES = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)
Bias = Literal["none", "all", "lora_only"]

# What PEFT writes and slothcore has no option for, with the only value under which an adapter means the same here.
# Written so that every reader of the format, old or new, finds what it expects.
FIXED_FIELDS: dict[str, Any] = {
    "auto_mapping": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "layer_replication": None,
    "loftq_config": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
}
# Values here say how an adapter was made or run, not what it computes.
HARMLESS_FIELDS = frozenset(
    {
        "auto_mapping",
        "eva_config",
        "inference_mode",
        "loftq_config",  # of an initialisation that is refused by its own name
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
    }
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter: W + scaling * B A on each target.

    Attributes:
        r: rank of A [r, in] and B [out, r].
        lora_alpha: numerator of the scaling.
        lora_dropout: probability that the LoRA term does not see an element of its input while training.
        target_modules: names of linear layers (a name stands for every module whose path ends with it), or a regular
            expression for whole paths, or "all-linear": every linear layer but the head.
        target_parameters: parameters with a LoRA term, which an adapter of PEFT has for fused experts; `load_adapter`
            takes it apart, and none is left on a model.
        exclude_modules: names or a regular expression of modules that are no target.
        bias: which biases train: none, all of the model's, or those of the targets.
        use_rslora: scaling = lora_alpha / sqrt(r) instead of lora_alpha / r (arXiv:2312.03732).
        use_dora: the rows of W + scaling * B A get lengths that are learned apart (arXiv:2402.09353).
        init_lora_weights: what the factors began with: see `init_names`. In a file, True stands for all that began with
            a part of the base weights, too; `recorded` keeps the rest.
        modules_to_save: modules that train as a whole; a name stands for every path that ends with its letters, so
            "norm" is every norm (as in PEFT).
        layers_to_transform: indices of the layers with targets; None or empty: all.
        layers_pattern: names of the list of layers that these indices count in; None: any.
        rank_pattern, alpha_pattern: r and lora_alpha of the targets whose path ends with a regular expression.
        base_model_name_or_path: what the adapter belongs to.
        revision: branch, tag or commit of that on the Hub; None: main.
    Raises: ValueError if a value is out of its range.
    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    target_parameters: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] | str | None = None
    bias: Bias = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in TUPLES:
            object.__setattr__(self, name, _as_tuple(getattr(self, name), name))
        for where, rank in [("r", self.r), *self.rank_pattern.items()]:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"the rank of LoRA must be a whole number of at least 1, got {where} = {rank!r}")
        for where, alpha in [("lora_alpha", self.lora_alpha), *self.alpha_pattern.items()]:
            if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
                raise ValueError(f"lora_alpha must be a number greater than 0, got {where} = {alpha!r}")
        if isinstance(self.lora_alpha, float) and self.lora_alpha.is_integer():
            object.__setattr__(self, "lora_alpha", int(self.lora_alpha))  # as PEFT writes it
        if not isinstance(self.lora_dropout, int | float) or not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout!r}")
        for name in ("use_dora", "use_rslora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.bias not in get_args(Bias):
            raise ValueError(f"bias must be one of {', '.join(get_args(Bias))}, got {self.bias!r}")
        if self.init_lora_weights not in ALONE:
            check_init(self.init_lora_weights)
        if not all(type(layer) is int for layer in self.layers_to_transform or ()):
            raise ValueError(f"layers_to_transform must be a list of whole numbers, got {self.layers_to_transform!r}")
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules is empty; name linear layers, or 'all-linear'")
        patterns = [p for p in (self.target_modules, self.exclude_modules) if isinstance(p, str)]
        for pattern in [*patterns, *self.rank_pattern, *self.alpha_pattern]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error

    def rank_of(self, module: str) -> int:
        """r of the target at this path."""
        return by_pattern(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        """lora_alpha of the target at this path."""
        alpha: float = by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha

    def scaling_of(self, module: str) -> float:
        """What multiplies B A of the target at this path."""
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, linears: Sequence[str], *, head: str = "lm_head") -> list[str]:
        """Those paths in `linears` that get a LoRA term.

        Raises: ValueError if none does, listing the names that would.
        """
        chosen = self.matching(linears, head=head)
        if not chosen:
            said = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
            raise ValueError(unmatched_names(said, linears))
        return chosen

    def matching(self, linears: Sequence[str], *, head: str = "lm_head") -> list[str]:
        """Those paths in `linears` that get a LoRA term; may be none, where parameters get one."""
        return [path for path in linears if self._is_target(path, head)]

    def require_all_match(self, linears: Sequence[str]) -> None:
        """Raises: ValueError, listing the known names, if one in `target_modules` stands for no path in `linears`."""
        if isinstance(self.target_modules, str):
            return
        unmatched = [name for name in self.target_modules if not any(ends_with(path, name) for path in linears)]
        if unmatched:
            raise ValueError(unmatched_names(unmatched, linears))

    def require_all_used(self, targets: Sequence[str]) -> None:
        """Raises: ValueError if an expression in `rank_pattern` or `alpha_pattern` stands for no path in `targets`."""
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, option):
                if not any(by_pattern({pattern: True}, path, False) for path in targets):
                    raise ValueError(
                        f"{option} {pattern!r} matches none of the layers with LoRA, such as {targets[0]}; it has to "
                        "match the end of a path"
                    )

    def _is_target(self, path: str, head: str) -> bool:
        # A module trains either as a whole or through its LoRA term.
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save):
            return False
        if self.exclude_modules is not None and matches(self.exclude_modules, path):
            return False
        if self.target_modules == ALL_LINEAR:
            named = path != head
        elif path in self.target_modules and not isinstance(self.target_modules, str):
            return True  # by its whole path, such as the head, which is in no layer (as in PEFT)
        else:
            named = matches(self.target_modules, path)
        return named and self._is_in_chosen_layers(path)

    def _is_in_chosen_layers(self, path: str) -> bool:
        if not self.layers_to_transform:
            return True
        for name in self.layers_pattern or (r"[^.]*",):
            found = re.match(rf"(?:^|.*?\.){name}\.(?P<index>\d+)\.", path)
            if found:
                return int(found["index"]) in self.layers_to_transform
        return False

    def with_names(self, targets: Sequence[str]) -> "LoraConfig":
        """The same with "all-linear" written out as names, which every reader understands alike."""
        if self.target_modules != ALL_LINEAR:
            return self
        return replace(self, target_modules=tuple(sorted({path.rpartition(".")[2] for path in targets})))

    def with_paths(self, targets: Sequence[str]) -> "LoraConfig":
        """The same with an expression that is for some layers only, which PEFT refuses, written out as whole paths."""
        if not isinstance(self.target_modules, str) or self.layers_to_transform is None:
            return self
        return replace(self, target_modules=tuple(targets), layers_to_transform=None, layers_pattern=None)

    def for_older_readers(self, targets: Sequence[str]) -> "LoraConfig":
        """The same without words that PEFT has learned later: `exclude_modules` in 0.14, two initialisations since."""
        told = replace(self, init_lora_weights=True) if self.init_lora_weights in LATER else self
        if self.exclude_modules is None:
            return told
        return replace(
            told, target_modules=tuple(targets), exclude_modules=None, layers_to_transform=None, layers_pattern=None
        )

    def to_json(self) -> str:
        """The text of `adapter_config.json`, as PEFT lays it out."""
        values = {**asdict(self), **FIXED_FIELDS}
        if values["exclude_modules"] is None:
            del values["exclude_modules"]  # older versions of PEFT do not know it
        if not values["target_parameters"]:
            del values["target_parameters"]  # nor this
        values["modules_to_save"] = values["modules_to_save"] or None
        if self.init_lora_weights not in ALONE:
            values["init_lora_weights"] = True  # or PEFT would decompose the base before it loads these factors
        # Not sort_keys: of the patterns in a dictionary, the first that matches counts.
        return json.dumps(dict(sorted(values.items())), indent=2)

    @classmethod
    def from_json(cls, text: str, source: str = "adapter_config.json") -> "LoraConfig":
        """Read `adapter_config.json`, as slothcore or PEFT wrote it.

        Raises: ValueError, naming the field, for an adapter that is no LoRA or uses what slothcore does not implement.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{source} must hold a JSON object, got {type(values).__name__}")
        if values.get("peft_type") != "LORA":
            raise ValueError(
                f"{source}: only adapters of peft_type LORA are supported, got {values.get('peft_type')!r}"
            )
        known = {f.name for f in fields(cls)}
        for name, value in values.items():
            if name in known or name in HARMLESS_FIELDS:
                continue
            # A feature that a newer PEFT knows and this adapter does not use is written as null, false or empty.
            if value and value != FIXED_FIELDS.get(name):
                # Only for a slip of the pen: a feature of its own may have a name like another's.
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{source}: {name} = {value!r} is not supported{hint}")
        missing = [name for name in ("r", "lora_alpha", "target_modules") if values.get(name) is None]
        if missing:
            raise ValueError(f"{source} lacks {', '.join(missing)}")
        given = {name: values[name] for name in known if values.get(name) is not None}
        if given.get("init_lora_weights", True) not in (*ALONE, *REPEATABLE):
            raise ValueError(
                f"{source}: init_lora_weights is {given['init_lora_weights']!r}, so the adapter may belong to changed "
                "base weights; save it with PEFT's path_initial_model_for_weight_conversion"
            )
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def from_folder(cls, folder: str | Path) -> "LoraConfig":
        """Read the `adapter_config.json` of a folder. Raises: ValueError as `from_json`, or if there is none."""
        file = Path(folder) / "adapter_config.json"
        if not file.is_file():
            raise ValueError(f"{folder} is no adapter folder: it has no adapter_config.json")
        return cls.from_json(file.read_text(encoding="utf-8"), str(file))


def _as_tuple(value: Any, name: str) -> Any:
    """Lists and sets of names or numbers as tuples; sets sorted, for files that do not change from run to run."""
    if value is None or isinstance(value, tuple):
        return () if value is None and name == "modules_to_save" else value
    if isinstance(value, set | frozenset):
        return tuple(sorted(value))
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and name in ("modules_to_save", "layers_pattern"):
        return (value,)
    if isinstance(value, int) and name == "layers_to_transform":
        return (value,)
    if isinstance(value, str):
        return value
    raise ValueError(f"{name} must be a list of names, got {value!r}")
