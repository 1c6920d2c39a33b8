"""The strict reading of a Hugging Face `config.json`: each key is taken once, and none may be left."""

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Keys that change neither the values nor the gradients of a model: book-keeping, how other libraries run it, and
# defaults of transformers' generate, which slothcore takes from the caller instead.
HARMLESS_KEYS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "auto_map",
        "cache_implementation",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "finetuning_task",
        "id2label",
        "is_decoder",
        "is_llama_config",
        "label2id",
        "length_penalty",
        "max_length",
        "max_sequence_length",
        "min_length",
        "model_name",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "seq_length",
        "slothcore_merged",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    }
)

_REQUIRED = object()


@dataclass
class HfConfig:
    """A `config.json` from which each key is taken once; what is left over at the end is an error.

    Attributes:
        values: the keys not yet taken.
        source: where they came from, for messages.
    """

    values: dict[str, Any]
    source: str = "config.json"
    known: set[str] = field(default_factory=set)

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """Remove and return a value; null counts as absent.

        Raises: ValueError if the key is absent without a default, or its value is not of `kind`.
        """
        self.known.add(key)
        value = self.values.pop(key, None)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.source} lacks the key {key!r}")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds:
            kinds = (*kinds, int)
        # bool is an int to Python, but `"num_hidden_layers": true` is a mistake.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise ValueError(f"{self.source}: {key} must be {names}, got {value!r}")
        return value

    def require(self, key: str, *allowed: Any) -> None:
        """Take a key that has only some values we implement; absent counts as the first of them.

        Raises: ValueError naming the key and its value for any other.
        """
        self.known.add(key)
        value = self.values.pop(key, None)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{self.source}: {key} = {value!r} is not supported (only {', '.join(map(repr, allowed))})"
            )

    def finish(self) -> None:
        """Raise ValueError if a key is left that could change the model."""
        left = [key for key, value in self.values.items() if key not in HARMLESS_KEYS and value is not None]
        if left:
            key = left[0]
            near = difflib.get_close_matches(key, [*self.known, *HARMLESS_KEYS], n=1, cutoff=0.85)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.source}: the key {key!r} (= {self.values[key]!r}) is not supported{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: ValueError, naming the file, if it is absent or holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values
