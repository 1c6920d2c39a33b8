"""Streamed text: whole characters, no beginnings of stop strings, and joined exactly what the ids decode to."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers

from slothcore.data.tokenizer import Tokenizer
from slothcore.inference.endings import Endings
from slothcore.inference.text_pieces import INCOMPLETE, TextPieces, joint_of, text_behind
from tests.data.tiny_tokenizers import write_byte_tokenizer

TEXTS = [
    "plain words, and then some",
    "Grüße aus Köln, ça va? Ελληνικά и русский",
    "\N{PARTY POPPER}\N{FAMILY}\N{ZERO WIDTH JOINER}\N{GIRL} 我们在这里 \N{REGIONAL INDICATOR SYMBOL LETTER D}",
    "a\u0301 combined, \u200bempty, \ufeffmark, tab\tand\nlines\n\n",
    f"a written {INCOMPLETE} is a character too{INCOMPLETE}",
    "",
]


def byte_fallback_tokenizer(folder: Path) -> Tokenizer:
    """As Llama 2's: letters and a few words are tokens, all else is spelled byte by byte."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz,?", "▁the", "▁a", ""]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    first = len(vocabulary)
    vocabulary.update((word, first + i) for i, word in enumerate(words))
    core = Core(models.BPE(vocab=vocabulary, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<s>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module", params=["bytes", "byte fallback"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bytes":
        return Tokenizer.from_folder(write_byte_tokenizer(folder))
    return byte_fallback_tokenizer(folder)


def given(tokenizer: Tokenizer, ids: list[int], *, stops: tuple[str, ...] = (), eos: tuple[int, ...] = ()) -> list[str]:
    return list(TextPieces(tokenizer, Endings(frozenset(eos), stops)).take(iter(ids)))


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_and_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = given(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert all(pieces)
    if INCOMPLETE not in text:
        assert INCOMPLETE not in "".join(pieces)


@pytest.mark.parametrize("text", TEXTS[:4])
def test_what_goes_on_with_a_text_completes_it(tokenizer: Tokenizer, text: str) -> None:
    text = f"{text} the  end, 我们 a b"
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = 0
    for place in range(1, len(ids)):
        pieces = TextPieces(tokenizer, Endings(frozenset(), ()), behind=ids[:place])
        added = "".join(pieces.take(iter(ids[place:])))
        assert added == text_behind(tokenizer, joint_of(tokenizer, ids[:place]), ids[place:])
        before = tokenizer.decode(ids[:place])
        if INCOMPLETE not in before:
            assert before + added == text
            whole += 1
    assert whole > 12
    control = tokenizer.token_id("<s>")
    assert joint_of(tokenizer, [*ids, control]) == joint_of(tokenizer, []) == []


def test_text_comes_as_soon_as_it_is_settled(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    pieces = TextPieces(tokenizer, Endings(frozenset(), ()))
    shown = ""
    for end, token in enumerate(ids, start=1):
        shown += pieces.add(token)
        assert shown == tokenizer.decode(ids[:end]), "nothing waits that no later token can change"


def test_a_character_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x我y", add_special_tokens=False)
    pieces = TextPieces(tokenizer, Endings(frozenset(), ()))
    shown = [pieces.add(token) for token in ids]
    assert [piece for piece in shown if piece] in (["x", "我", "y"], ["x", "我y"])


@pytest.mark.parametrize("seed", range(30))
def test_any_ids_are_decoded_as_they_are_at_once(tokenizer: Tokenizer, seed: int) -> None:
    """Random tokens, which make bytes that are no characters, and characters whose neighbours spoil them.

    Control tokens and ids without a token are among them, which have no text and do not end a run of bytes.
    """
    draw = random.Random(seed)
    ids = [draw.randrange(tokenizer.vocab_size + 9) for _ in range(draw.randrange(1, 60))]
    # Runs of real characters among them, cut off anywhere.
    for _ in range(3):
        spelled = tokenizer.encode("\N{PARTY POPPER}我é", add_special_tokens=False)
        place = draw.randrange(len(ids))
        ids[place:place] = spelled[: draw.randrange(1, len(spelled) + 1)]
    assert "".join(given(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(24))
def test_a_long_answer_is_decoded_as_it_is_at_once(
    tokenizer: Tokenizer, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end alone is decoded again and again, wherever that begins: in a character, between control tokens."""
    monkeypatch.setattr("slothcore.inference.text_pieces.LONGEST_END", 1 + seed % 7)
    monkeypatch.setattr("slothcore.inference.text_pieces.JOINT", 1 + seed % 5)
    draw = random.Random(seed)
    ids: list[int] = []
    while len(ids) < 300:
        ids += tokenizer.encode(draw.choice(TEXTS), add_special_tokens=False)[: draw.randrange(40)]
        ids += [draw.randrange(tokenizer.vocab_size + 9) for _ in range(draw.randrange(6))]
        ids += [token for token in (tokenizer.token_id(""), tokenizer.token_id("<s>")) if token] * draw.randrange(5)
        ids += tokenizer.encode(" a  the", add_special_tokens=False)
    assert "".join(given(tokenizer, ids)) == tokenizer.decode(ids)
    pieces, shown, decoded = TextPieces(tokenizer, Endings(frozenset(), ())), "", []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda some: (decoded.append(len(some)), decode(some))[1])
    for end, token in enumerate(ids, start=1):
        shown += pieces.add(token)
        assert decode(ids[:end]).startswith(shown)
    assert max(decoded) < 150, "a long answer was decoded as a whole"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "ne t"), "o"),
        ("one two three", ("absent", "threes"), "one two three"),
        ("aab", ("ab",), "a"),
        ("abac", ("abab", "ac"), "ab"),
        ("we 我们 say", ("们",), "we 我"),
    ],
)
def test_what_may_be_a_stop_string_waits(tokenizer: Tokenizer, text, stops, expected) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = ""
    pieces = TextPieces(tokenizer, Endings(frozenset(), stops))
    for piece in pieces.take(iter(ids)):
        shown += piece
        assert expected.startswith(shown), "what was shown cannot be taken back"
    assert shown == expected == pieces.endings.cut(tokenizer.decode(ids))
    assert pieces.ended == (expected != text)


def test_no_token_is_taken_behind_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    end = ids[2]
    tokens = iter(ids)
    pieces = TextPieces(tokenizer, Endings(frozenset({end}), ()))
    assert "".join(pieces.take(tokens)) == tokenizer.decode(ids[:2])
    assert pieces.ended
    assert list(tokens) == ids[3:]
    tokens = iter([*ids, *ids])
    pieces = TextPieces(tokenizer, Endings(frozenset(), ("the c",)))
    assert list(pieces.take(tokens)) == []
    assert pieces.ended
    assert tokenizer.decode([*ids, *ids][: -len(list(tokens))]) == "the c"
