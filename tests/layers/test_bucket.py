"""The ladder of buckets, and what padding puts where."""

import pytest
import torch

from slothcore.layers.bucket import Bucket, bucket_for, pad_to
from slothcore.layers.packed import ALIGNMENT, PackedInputs, pack_inputs


def packed(lengths: list[int]) -> PackedInputs:
    ids = torch.arange(sum(lengths)) % 50 + 1
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    return pack_inputs(ids, labels=ids, cu_seqlens=boundaries, vocab_size=97)


@pytest.mark.parametrize("documents", [1, 8, 15, 16, 100])
def test_every_pass_has_a_bucket_with_little_padding(documents: int) -> None:
    earlier = Bucket(0, 0)
    for tokens in range(documents, 9000, 7):
        bucket = bucket_for(tokens, documents)
        assert bucket.tokens - tokens < max(128, tokens / 4), "padding"
        assert bucket.documents > documents, "the padding has a slot of its own"
        assert bucket.tokens >= earlier.tokens, "a longer pass never has a smaller bucket"
        assert bucket.tokens % ALIGNMENT == 0
        assert bucket_for(bucket.tokens, documents) == bucket, "the bucket holds itself"
        earlier = bucket


def test_the_rungs() -> None:
    rungs = {bucket_for(tokens, 1).tokens for tokens in range(1, 4097)}
    assert sorted(rungs) == [*range(128, 1025, 128), *range(1280, 2049, 256), *range(2560, 4097, 512)]
    assert [bucket_for(1024, documents).documents for documents in (1, 31, 32, 64)] == [32, 32, 64, 128]


def test_padding_is_a_document_of_its_own() -> None:
    inputs = packed([3, 1, 4])
    padded = pad_to(inputs, Bucket(16, 6))
    assert padded.input_ids.tolist() == [*inputs.input_ids.tolist(), *[0] * 8]
    assert padded.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, *range(8)]
    assert padded.documents.cu_seqlens.tolist() == [0, 3, 4, 8, 16, 16, 16]
    assert padded.documents.cu_seqlens.dtype == torch.int32
    assert padded.documents.max_seqlen == 16
    assert len(padded.documents) == 6
    assert padded.targets is inputs.targets
    assert padded.rows is inputs.rows


def test_a_full_bucket_needs_no_slot_for_padding() -> None:
    inputs = packed([3, 1, 4])
    padded = pad_to(inputs, Bucket(8, 3))
    assert torch.equal(padded.input_ids, inputs.input_ids)
    assert torch.equal(padded.documents.cu_seqlens, inputs.documents.cu_seqlens)
    for too_small in (Bucket(7, 9), Bucket(8, 2), Bucket(9, 3)):
        assert not too_small.holds(inputs)
        with pytest.raises(ValueError, match="8 tokens in 3 documents do not fit"):
            pad_to(inputs, too_small)


def test_inputs_cross_to_another_device_together() -> None:
    inputs = pack_inputs(
        torch.tensor([[0, 5, 6], [7, 8, 0]]),
        labels=torch.tensor([[0, 5, 6], [7, 8, 0]]),
        attention_mask=torch.tensor([[0, 1, 1], [1, 1, 0]]),
        vocab_size=97,
    )
    assert inputs.to(torch.device("cpu")) is inputs
    moved = inputs.to(torch.device("meta"))
    for name in ("input_ids", "position_ids", "targets", "rows", "places"):
        ours, theirs = getattr(moved, name), getattr(inputs, name)
        assert (ours.device.type, ours.shape, ours.dtype) == ("meta", theirs.shape, torch.int64), name
        assert ours.storage_offset() % ALIGNMENT == 0, name
    assert moved.documents.cu_seqlens.dtype == torch.int32
    assert (moved.shape, moved.documents.max_seqlen) == (inputs.shape, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("with_labels", [True, False])
def test_inputs_on_the_gpu_are_those_of_the_host(with_labels: bool) -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    ids = torch.tensor([[0, 5, 6], [7, 8, 0]])
    inputs = pack_inputs(ids, labels=ids if with_labels else None, attention_mask=mask, vocab_size=97)
    moved = inputs.to(torch.device("cuda", 0))
    for name in ("input_ids", "position_ids", "targets", "rows", "places"):
        ours, theirs = getattr(moved, name), getattr(inputs, name)
        assert (ours is None) == (theirs is None)
        assert theirs is None or torch.equal(ours.cpu(), theirs), name
    assert torch.equal(moved.documents.cu_seqlens.cpu(), inputs.documents.cu_seqlens)
