"""A small world of market trades, written out as plain English.

The base model is trained on `stories`, a few trades told in varied sentences with questions and answers in plain
words; on `tasks`, the same questions as instructions; and on `copies`, instructions to repeat a line of mixed
characters. It so learns to read a trade, to look a detail up and to spell, but it never sees JSON. `records` is the new
skill of the demo: write one trade as JSON. Everything follows from the seed.
"""

import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = (
    "Anna Boris Clara David Elena Felix Greta Henry Irene Jakob Karla Leo Marta Nils Olga Paul Rosa Simon Tilda Viktor "
    "Alice Bruno Celia Dario Emma Fred Gina Hugo Ida Jonas Kira Lukas Mina Noah Oskar Petra Ralf Sara Tom Ute"
).split()
COLOURS = "red green blue yellow white black brown grey".split()
GOODS = (
    "apples pears plums onions carrots candles baskets blankets ribbons hats scarves spoons plates cups ropes "
    "lanterns boxes brushes bells kites"
).split()
PLACES = ("market", "harbour", "mill", "bakery", "old bridge", "town hall", "station", "orchard")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "two three four five six seven eight nine ten eleven twelve".split()

SENTENCES = (
    "On {day}, {seller} sold {number} {goods} to {buyer} at the {place} for {price} coins.",
    "{buyer} bought {number} {goods} from {seller} at the {place} on {day} and paid {price} coins.",
    "For {price} coins, {buyer} got {number} {goods} from {seller} on {day} at the {place}.",
    "At the {place}, {seller} handed {number} {goods} to {buyer} on {day}. The price was {price} coins.",
    "{seller} met {buyer} at the {place} on {day} and sold {number} {goods}. It cost {price} coins.",
    "It was {day} when {buyer} came to the {place}. {seller} had {number} {goods}; {buyer} got them for {price} coins.",
    "{number} {goods} went from {seller} to {buyer} for {price} coins at the {place} on {day}.",
    "{buyer} paid {seller} {price} coins for {number} {goods}. That was on {day} at the {place}.",
)

QUESTIONS = (
    ("Who sold the {goods}?", "{seller}."),
    ("Who bought the {goods}?", "{buyer}."),
    ("What did {buyer} buy?", "{number} {goods}."),
    ("What did {seller} sell?", "{number} {goods}."),
    ("How many {goods} did {buyer} buy?", "{number}, that is {count}."),
    ("How much did {buyer} pay?", "{price} coins."),
    ("Who was the seller of the {goods}?", "{seller}."),
    ("Who was the buyer of the {goods}?", "{buyer}."),
    ("What was the price of the {goods}?", "{price} coins."),
    ("What was the count of the {goods}?", "{count}."),
    ("Name the goods that {seller} sold.", "{goods}."),
    ("Where did {buyer} meet {seller}?", "At the {place}."),
    ("When did {seller} sell the {goods}?", "On {day}."),
    (
        "Tell me about the {goods}.",
        "{seller} sold {count} {goods} to {buyer} on {day} at the {place} for {price} coins.",
    ),
)


@dataclass(frozen=True)
class Trade:
    """One sale; `price` is in coins."""

    seller: str
    buyer: str
    goods: str
    count: int
    place: str
    day: str
    price: int

    def words(self) -> dict[str, object]:
        return vars(self) | {"number": NUMBERS[self.count - 2]}

    def told(self, generator: random.Random) -> str:
        sentence = generator.choice(SENTENCES).format(**self.words())
        return sentence[0].upper() + sentence[1:]

    def as_json(self) -> str:
        fields = ("seller", "buyer", "goods", "count", "price")
        return json.dumps({field: getattr(self, field) for field in fields})


def trade(generator: random.Random) -> Trade:
    seller, buyer = generator.sample(NAMES, 2)
    return Trade(
        seller=seller,
        buyer=buyer,
        goods=f"{generator.choice(COLOURS)} {generator.choice(GOODS)}",
        count=generator.randrange(2, 2 + len(NUMBERS)),
        place=generator.choice(PLACES),
        day=generator.choice(DAYS),
        price=generator.randrange(2, 100),
    )


def stories(count: int, seed: int) -> Iterator[dict[str, str]]:
    """`{"text": ...}` records for the base model: one to three trades, then two to five questions with answers."""
    generator = random.Random(seed)
    for _ in range(count):
        trades = [trade(generator) for _ in range(generator.randint(1, 3))]
        lines = [" ".join(t.told(generator) for t in trades)]
        for _ in range(generator.randint(2, 5)):
            chosen = generator.choice(trades)
            question, answer = generator.choice(QUESTIONS)
            lines.append(f"Question: {question.format(**chosen.words())}")
            reply = answer.format(**chosen.words())
            lines.append(f"Answer: {reply[0].upper() + reply[1:]}")
        yield {"text": "\n".join(lines)}


def tasks(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Instruction records that the base model does learn: one question about told trades, answered in plain words."""
    generator = random.Random(seed)
    for _ in range(count):
        trades = [trade(generator) for _ in range(generator.randint(1, 2))]
        chosen = generator.choice(trades)
        question, answer = generator.choice(QUESTIONS)
        reply = answer.format(**chosen.words())
        yield {
            "instruction": question.format(**chosen.words()),
            "input": " ".join(t.told(generator) for t in trades),
            "output": reply[0].upper() + reply[1:],
        }


def copies(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Instruction records that use every character: a line of words, numbers and signs, to be repeated as it is."""
    generator = random.Random(seed)
    words = [*NAMES, *COLOURS, *GOODS, *DAYS, *NUMBERS, "seller", "buyer", "goods", "count", "price", "coins"]
    for _ in range(count):
        pieces = []
        for _ in range(generator.randint(4, 16)):
            kind = generator.random()
            if kind < 0.35:
                pieces.append(generator.choice(words))
            elif kind < 0.5:
                pieces.append(str(generator.randrange(100)))
            elif kind < 0.6:
                pieces.append("".join(generator.choices(string.ascii_letters, k=generator.randint(1, 5))))
            else:
                pieces.append("".join(generator.choices(string.punctuation, k=generator.randint(1, 3))))
            pieces.append(generator.choice(("", " ")))
        line = "".join(pieces).strip()
        yield {"instruction": "Repeat the line.", "input": line, "output": line}


def records(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Instruction records of the new skill, which the base model never saw: a told trade becomes one line of JSON."""
    generator = random.Random(seed)
    for _ in range(count):
        one = trade(generator)
        yield {"instruction": "Write the trade as JSON.", "input": one.told(generator), "output": one.as_json()}
