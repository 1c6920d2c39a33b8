"""What stands between a user's model and data and the loop: checks, tokenizing, packing."""

import sys
from collections.abc import Iterable, Sequence, Sized
from typing import Any, cast

import torch

from slothcore.data.dataset import Dataset, open_dataset
from slothcore.data.masking import TokenizedRow
from slothcore.data.packing import wasted_fraction
from slothcore.data.preparing import Settings, prepare_dataset
from slothcore.data.token_store import TokenStore
from slothcore.data.tokenizer import Tokenizer
from slothcore.data.values import counted
from slothcore.lora.attach import lora_config_of
from slothcore.models.decoder import Decoder
from slothcore.training.batches import RowSet
from slothcore.training.config import TrainConfig
from slothcore.training.new_tokens import say_what_tables_learn
from slothcore.training.progress import say

DEFAULT_MAX_SEQ_LENGTH = 2048
# For tokenizers without a template: it needs no tokens of its own, and ends a turn with the end-of-sequence token.
FALLBACK_TEMPLATE = "vicuna"


def resolve_max_seq_length(config: TrainConfig, model: Decoder) -> int:
    """The longest row. Raises ValueError if the configuration asks for more than the model takes."""
    if config.max_seq_length is None:
        return min(DEFAULT_MAX_SEQ_LENGTH, model.max_seq_length)
    if config.max_seq_length > model.max_seq_length:
        raise ValueError(
            f"max_seq_length is {config.max_seq_length}, but the model takes at most {model.max_seq_length} tokens; "
            "lower it, or load the model with a longer max_seq_length"
        )
    return config.max_seq_length


def check_evaluation(config: TrainConfig, *, has_data: bool) -> None:
    """Raise ValueError if evaluation is asked for every few steps, and there is nothing to evaluate on."""
    for name in ("eval_steps", "eval_on_start"):
        if getattr(config, name) and not has_data:
            raise ValueError(
                f"{name} is {str(getattr(config, name)).lower()}, but there is no evaluation data; "
                f"give eval_data, eval_fraction or an eval_dataset, or drop {name}"
            )


def choose_trainable(model: Decoder, config: TrainConfig) -> None:
    """Make trainable what the configuration says: all weights, or what `add_lora` left so.

    Raises: ValueError if the model and the configuration do not fit together.
    """
    adapter = lora_config_of(model)
    has_adapter = adapter is not None
    if config.full_finetuning:
        if has_adapter:
            raise ValueError("full_finetuning is set, but the model has a LoRA adapter; merge it, or drop the option")
        if model.bits == 4:
            raise ValueError("full_finetuning trains dense weights, but the model has 4 bits; load it with 16 or 32")
        if model.dtype == torch.float16:
            raise ValueError("full_finetuning in float16 loses small updates; load the model in bfloat16 or float32")
        model.requires_grad_(True)
    elif not has_adapter:
        raise ValueError("the model has no LoRA adapter; call slothcore.add_lora(model), or set full_finetuning")
    if any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
        # Gradients are scaled against underflow, and a float16 one may overflow when it is scaled back.
        raise ValueError("float16 weights cannot be trained; set lora_dtype to float32, or train in bfloat16")
    if adapter is not None and adapter.use_dora:
        twice = "; with lora_dropout every product with a weight is done twice" if adapter.lora_dropout else ""
        say(f"DoRA: the lengths of the weights' rows train beside the factors{twice}")
    say_what_tables_learn(model)
    model.gradient_checkpointing = config.gradient_checkpointing
    model.neftune_noise_alpha = config.neftune_noise_alpha


def allows_graphs(model: Decoder, config: TrainConfig) -> bool:
    """Whether short passes are to replay CUDA graphs: where the configuration and the model allow it.

    The model is left without graphs.

    Raises: ValueError if graphs are asked for and the model, or where it is, does not allow them.
    """
    if config.cuda_graphs is False:
        return False
    model.enable_graphs(max_tokens=config.graph_tokens)
    assert model.graphs is not None
    obstacle = model.graphs.why_not()
    model.disable_graphs()
    if obstacle is None:
        return True
    if config.cuda_graphs:
        raise ValueError(f"cuda_graphs is true, and cannot be: {obstacle}; set it to null or false")
    if model.device.type == "cuda":
        say(f"without CUDA graphs: {obstacle}")
    return False


def shows_progress(config: TrainConfig) -> bool:
    """Whether bars are drawn: in a terminal, unless the configuration says no."""
    return not config.disable_tqdm and sys.stderr.isatty()


def prepare_rows(
    dataset: Iterable[Any],
    tokenizer: Tokenizer | None,
    config: TrainConfig,
    *,
    what: str,
    learned: RowSet | None = None,
) -> RowSet:
    """Tokenise and pack a dataset as the configuration says, and tell the user what became of it.

    Args:
        dataset: a `Dataset`, records (a list, a generator, a `datasets.Dataset`), or rows that are tokenised already.
        what: the name of this dataset in messages.
        learned: what is trained on, of a dataset to evaluate on; what is in both is counted in a note.
    Raises: ValueError if it is empty, a record does not fit its format, or a tokenised row cannot be used.
    """
    assert config.max_seq_length is not None
    if not isinstance(dataset, Sized) and iter(dataset) is dataset:
        dataset = list(dataset)  # it can be gone through only once
    if isinstance(dataset, Sized) and not len(dataset):
        raise ValueError(f"the {what} dataset is empty; give at least one record")
    if isinstance(dataset, Sequence) and all(isinstance(item, TokenizedRow) for item in dataset):
        rows = [_checked(cast(TokenizedRow, row), i, config.max_seq_length, what) for i, row in enumerate(dataset)]
        store = TokenStore.from_rows(rows)
    else:
        if tokenizer is None:
            raise ValueError(f"the {what} dataset is not tokenised; give a tokenizer too")
        store = _tokenised(dataset, tokenizer, config, what)
    if learned is not None and (known := learned.num_known(store)):
        verb = "is" if known == 1 else "are"
        say(
            f"{what}: {known:,} of {counted(len(store), 'document')} {verb} in the training data, too, token by token, "
            "so its loss is not only of unseen text; drop the copies from one of both"
        )
    if not config.packing:
        return RowSet(store)
    packed = RowSet(store, capacity=config.max_seq_length)
    wasted = wasted_fraction(packed.rows, packed.document_lengths, config.max_seq_length)
    say(
        f"{what}: {counted(len(store), 'document')} packed into {counted(len(packed), 'row')} "
        f"of up to {config.max_seq_length:,} tokens, {wasted:.1%} free"
    )
    return packed


def _tokenised(dataset: Iterable[Any], tokenizer: Tokenizer, config: TrainConfig, what: str) -> TokenStore:
    """Check records that are not yet, and tokenise all."""
    assert config.max_seq_length is not None
    progress = shows_progress(config)
    if not isinstance(dataset, Dataset):
        dataset = open_dataset(
            dataset,
            config.format,
            text_field=config.text_field,
            prompt_template=config.prompt_template,
            completion_template=config.completion_template,
            on_bad_row=config.on_bad_row,
            progress=progress,
        )
    for note in dataset.notes:
        say(f"{what}: {note}")
    if config.chat_template is not None:
        tokenizer.use_chat_template(config.chat_template)
        if not dataset.has_conversations():
            say(
                f"{what}: no record is a conversation, so chat_template writes none of them; "
                "slothcore.standardize makes conversations of them"
            )
    if tokenizer.chat_template is None and dataset.has_conversations():
        tokenizer.use_chat_template(FALLBACK_TEMPLATE)
        say(
            f"{what}: the tokenizer has no chat template, so conversations are written by the built-in "
            f"{FALLBACK_TEMPLATE}; choose another with chat_template"
        )
    settings = Settings(
        max_seq_length=config.max_seq_length,
        completion_only_loss=config.completion_only_loss,
        mask_history=config.mask_history,
        overlength=config.overlength,
        on_bad_row=config.on_bad_row,
    )
    prepared = prepare_dataset(dataset, tokenizer, settings, progress=progress)
    say(f"{what}: {prepared.stats.describe(config.max_seq_length)}")
    if prepared.stats.first_skipped:
        say(f"{what}: the first left out: {prepared.stats.first_skipped}")
    if unknown := prepared.stats.unknown_targets:
        assert tokenizer.unk_token_id is not None
        token = tokenizer.decode([tokenizer.unk_token_id], skip_special_tokens=False)
        say(
            f"{what}: {token!r}, which stands for characters that the vocabulary lacks, is learned "
            f"{counted(unknown, 'time')}; replace these characters, or add them with new_tokens"
        )
    if lost := prepared.stats.unwritten_thoughts:
        say(
            f"{what}: the chat template leaves out the thoughts of {counted(lost, 'row')}, which are not learned; "
            "write them into the content, or choose a chat_template that writes them"
        )
    if tokenizer.eos_token_id is None and not dataset.has_conversations():
        say(
            f"{what}: the tokenizer has no end token, so texts and answers end without one, and the model does not "
            "learn to stop; name it as eos_token in tokenizer_config.json"
        )
    for note in prepared.notes:
        say(f"{what}: {note}")
    return prepared.store


def _checked(row: TokenizedRow, index: int, max_seq_length: int, what: str) -> TokenizedRow:
    """Tokenised rows come from the user's own code; what it did is checked but not repaired."""
    if len(row.input_ids) != len(row.labels):
        raise ValueError(f"{what} row {index} has {len(row.input_ids)} ids but {len(row.labels)} labels")
    if len(row.input_ids) > max_seq_length:
        raise ValueError(
            f"{what} row {index} has {len(row.input_ids)} tokens; max_seq_length is {max_seq_length}: cut or drop it"
        )
    if row.num_targets == 0:
        raise ValueError(f"{what} row {index} has no target: all labels after the first are -100; drop it")
    return row
