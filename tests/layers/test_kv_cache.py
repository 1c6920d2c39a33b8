"""The cache as a whole: pages given and taken back, rings, passes of every kind, against plain lists of tokens."""

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from slothcore.layers.kv_cache import KvCache
from slothcore.layers.packed import Documents
from slothcore.layers.page_table import PageTable, pages_within
from slothcore.models.load import from_config
from tests.layers.cache_passes import begin_chunk, begin_prompt, begin_tokens
from tests.models.test_config import TINY
from tests.models.tiny import token_ids

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
WINDOWS = (None, 5, 9, 5)


def make_cache(rows: int = 3, capacity: int = 40, **options: Any) -> KvCache:
    defaults: dict[str, Any] = {
        "windows": WINDOWS,
        "page_size": 4,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": torch.float64,
        "device": torch.device("cpu"),
    }
    return KvCache(rows=rows, capacity=capacity, **{**defaults, **options})


def packed(lengths: list[int]) -> Documents:
    return Documents(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))


class Texts:
    """What each row was given, as plain lists, and the attention that follows from it by the definition."""

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self.rows: dict[int, list[Tensor]] = {}

    def run(self, rows: list[int]) -> None:
        """One pass, of a token of each of `rows` (-1: an idle one) in that order; compares every layer's result."""
        qkv = torch.randn(len(rows), HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=torch.float64)
        seen = []
        for token, row in zip(qkv, rows, strict=True):
            if row >= 0:
                self.rows.setdefault(row, []).append(token)
            seen.append(len(self.rows[row]) if row >= 0 else 0)
        for index, window in enumerate(WINDOWS):
            layer = self.cache.layer(index)
            layer.store_(qkv.clone(), None, num_heads=HEADS)
            if layer.is_prompt:
                continue
            actual = layer.attend(qkv[:, :HEADS], scale=0.7, window=window, softcap=None)
            for i, (row, count) in enumerate(zip(rows, seen, strict=True)):
                expected = (
                    self.attention(qkv[i, :HEADS], self.rows[row][:count], window) if row >= 0 else qkv[0, :HEADS] * 0
                )
                torch.testing.assert_close(actual[i], expected)

    def attention(self, query: Tensor, tokens: list[Tensor], window: int | None) -> Tensor:
        text = torch.stack(tokens[-window:] if window else tokens)
        keys, values = text[:, HEADS : HEADS + KV_HEADS], text[:, HEADS + KV_HEADS :]
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (keys, values))
        weights = (torch.einsum("hd,lhd->hl", query, keys) * 0.7).softmax(-1)
        return torch.einsum("hl,lhd->hd", weights, values)

    def prompt(self, lengths: dict[int, int]) -> None:
        for row in lengths:
            self.rows[row] = []
        begin_prompt(self.cache, lengths)
        self.run([row for row, length in lengths.items() for _ in range(length)])

    def token(self) -> None:
        rows = len(self.cache.lengths_on_host)
        positions = begin_tokens(self.cache)
        assert positions.tolist() == [len(self.rows.get(row, ())) if row in self.rows else -1 for row in range(rows)]
        self.run([row if row in self.rows else -1 for row in range(rows)])

    def chunk(self, row: int, count: int) -> None:
        length = len(self.rows[row])
        assert begin_chunk(self.cache, row, count).tolist() == list(range(length, length + count))
        self.run([row] * count)

    def release(self, row: int) -> None:
        self.cache.release(row)
        del self.rows[row]

    def shorten(self, row: int, length: int) -> None:
        self.cache.shorten(row, length)
        del self.rows[row][length:]


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_passes(seed: int) -> None:
    """Fewer pages than the rows could fill; texts come, grow one by one and in chunks, shrink and go."""
    draw = random.Random(seed)
    cache = make_cache(pages=12, largest_chunk=3)
    texts = Texts(cache)
    texts.prompt({1: 3, 0: 11})
    done = Counter()
    for _ in range(120):
        assert cache.lengths_on_host == [len(texts.rows.get(row, ())) for row in range(3)]
        row = draw.randrange(3)
        length = len(texts.rows.get(row, ()))
        action = draw.choice(("token", "token", "token", "prompt", "chunk", "release", "shorten"))
        if action == "prompt":
            length = draw.randrange(20, 41)
            if not cache.room_for(row, length):
                action = "refused"
                with pytest.raises(ValueError, match="more pages of the cache"):
                    cache.reserve(row, length)
            else:
                texts.prompt({row: length})
        elif action == "token" and texts.rows:
            for other, tokens in list(texts.rows.items()):
                if cache.room_for(other, len(tokens) + 1):
                    cache.reserve(other, len(tokens) + 1)
                else:
                    texts.release(other)
            texts.token()
        elif action == "chunk" and length and cache.room_for(row, length + 3):
            texts.chunk(row, draw.randrange(1, 4))
        elif action == "release" and length:
            texts.release(row)
        elif action == "shorten" and length > 3:
            # The window of 5 and a chunk of 3 lie in two pages of 4: three tokens beyond the window's other four.
            texts.shorten(row, max(1, cache._longest_on_host[row] - 3))
        else:
            continue
        done[action] += 1
    assert len(done) == 6, done
    for row in list(texts.rows):
        texts.release(row)
    assert cache.free_tokens == 12 * 4


def test_a_window_keeps_no_more_than_itself() -> None:
    cache = make_cache(rows=2, capacity=400)
    pages = [len(keys) for keys in cache.keys]
    assert pages == [2 * 100, 2 * 2, 2 * 3, 2 * 2]
    texts = Texts(cache)
    texts.prompt({0: 333, 1: 1})
    for _ in range(12):
        texts.token()
    assert cache.nbytes == sum(pages) * 4 * 2 * KV_HEADS * HEAD_DIM * 8
    assert cache.nbytes_per_token == len(WINDOWS) * 2 * KV_HEADS * HEAD_DIM * 8


def test_some_rows_of_a_pass_in_any_order_with_idle_ones_to_fill() -> None:
    """As a captured graph of four tokens runs while three rows are in use."""
    cache = make_cache(rows=6)
    texts = Texts(cache)
    texts.prompt({4: 3, 1: 7, 5: 2})
    rows = torch.tensor([5, 0, 4, 0], dtype=torch.int32)
    for _ in range(9):
        cache.count_tokens([5, 4, 0])
        assert cache.place_tokens(rows).tolist() == [len(texts.rows[5]), -1, len(texts.rows[4]), -1]
        texts.run([5, -1, 4, -1])
    texts.token()
    assert cache.lengths_on_host == [0, 8, 0, 0, 13, 12]
    assert cache.lengths.tolist() == cache.lengths_on_host


def test_what_the_device_reads_stays_where_it_is() -> None:
    cache = make_cache(pages=12)

    def addresses() -> list[int]:
        tables = [cache.layer(index).block_tables for index in range(len(WINDOWS))]
        return [tensor.data_ptr() for tensor in (cache.lengths, *tables, *cache.keys, *cache.values)]

    before = addresses()
    texts = Texts(cache)
    texts.prompt({0: 9})
    texts.token()
    texts.release(0)
    texts.prompt({2: 15, 1: 1})
    texts.token()
    assert addresses() == before


def test_pages() -> None:
    cache = make_cache(pages=6)
    assert cache.free_tokens == 24
    cache.reserve(0, 9)
    assert cache.free_tokens == 12
    cache.reserve(0, 12)
    cache.reserve(0, 4)
    assert cache.free_tokens == 12, "what a row has stays"
    assert (cache.room_for(1, 12), cache.room_for(1, 13), cache.room_for(0, 24), cache.room_for(0, 25)) == (1, 0, 1, 0)
    with pytest.raises(ValueError, match="13 tokens need 4 more pages of the cache, but 3 are free"):
        cache.reserve(1, 13)
    with pytest.raises(ValueError, match="at most 40 tokens, got 41"):
        cache.reserve(1, 41)
    assert cache.free_tokens == 12
    cache.release(0)
    assert cache.free_tokens == 24
    assert not cache.room_for(0, 41)


def test_narrow_tables_never_run_out_first() -> None:
    """Whatever is reserved, in any order: the widest table refuses before another has too few pages."""
    draw = random.Random(0)
    for pages in (4, 11, 17, 30):
        cache = make_cache(rows=5, pages=pages)
        for _ in range(300):
            row = draw.randrange(5)
            if draw.random() < 0.3:
                cache.release(row)
            elif cache.room_for(row, length := draw.randrange(1, 41)):
                cache.reserve(row, length)
            for table in cache._tables.values():
                given = [page for pages in table._given for page in pages]
                assert len(set(given)) == len(given) == table.pages - table.free_pages


def test_a_window_that_was_overwritten_cannot_be_brought_back() -> None:
    cache = make_cache()
    texts = Texts(cache)
    texts.prompt({0: 20})
    cache.shorten(0, 17)
    with pytest.raises(AssertionError, match="the window behind token 12 is overwritten"):
        cache.shorten(0, 12)
    cache.shorten(0, 0)
    with pytest.raises(AssertionError, match="more than it holds"):
        cache.shorten(0, 1)


def test_a_chunk_may_not_overwrite_what_it_sees() -> None:
    cache = make_cache(largest_chunk=3)
    Texts(cache).prompt({0: 20})
    with pytest.raises(AssertionError, match="a window keeps too little for 4 tokens at once"):
        begin_chunk(cache, 0, 4)


@pytest.mark.parametrize("count", [1, 2])
def test_padding_behind_a_chunk_is_overwritten(count: int) -> None:
    """Also round the rings of layers with windows, where it stands in the place of older tokens."""
    cache = make_cache(largest_chunk=4)
    texts = Texts(cache)
    texts.prompt({0: 3, 1: 7})
    for _ in range(6):
        length = len(texts.rows[1])
        cache.count_chunk(1, count, padding=4 - count)
        cache.place_chunk(torch.full((4,), 1, dtype=torch.int32), torch.arange(length, length + 4))
        texts.run([1] * 4)
        del texts.rows[1][length + count :]
        assert cache.lengths.tolist() == [3, length + count, 0]
        texts.chunk(1, 2)
        del texts.rows[0]
        cache.release(0)
        texts.prompt({0: 3})
    cache.count_tokens([0, 1])
    assert cache.place_tokens(torch.tensor([1, 0], dtype=torch.int32)).tolist() == [7 + 6 * (count + 2), 3]
    texts.run([1, 0])


def test_a_pass_with_a_cache_has_no_gradients() -> None:
    cache = make_cache()
    begin_prompt(cache, {0: 2})
    qkv = torch.randn(2, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    with pytest.raises(AssertionError, match="has no gradients"):
        cache.layer(0).store_(qkv, None, num_heads=HEADS)


def test_the_only_row_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.layers.test_kv_cache.WINDOWS", (None, None))
    cache = make_cache(rows=1, capacity=10, windows=(None, None))
    texts = Texts(cache)
    texts.prompt({0: 9})
    cache.grow(33)
    texts.chunk(0, 20)
    texts.shorten(0, 12)
    cache.grow(20)
    assert cache.capacity == 33
    texts.chunk(0, 21)
    assert cache.longest == 33


def test_pages_within_a_budget() -> None:
    shape: dict[str, Any] = {"num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": torch.float64}
    options: dict[str, Any] = {
        "windows": WINDOWS,
        "rows": 3,
        "capacity": 40,
        "page_size": 4,
        "largest_chunk": 2,
        **shape,
    }
    for nbytes in (0, 3000, 4000, 20_000, 55_555, 10**9):
        pages = pages_within(nbytes, **options)
        if pages:
            assert make_cache(pages=pages).nbytes <= nbytes
        if pages < 30:
            assert make_cache(pages=pages + 1).nbytes > nbytes
        else:
            assert pages == 30 == sum(table.pages for table in [make_cache()._widest])


def test_pages_are_sent_only_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr("slothcore.layers.page_table.send", lambda source, target: sent.append(target.copy_(source)))
    table = PageTable(rows=2, width=3, pages=4, page_size=2, device=torch.device("cpu"))
    table.upload()
    table.give(0, 3)
    table.upload()
    table.give(0, 4)
    table.upload()
    assert len(sent) == 1
    assert table.on_device[0, :2].tolist() == [0, 1]


@pytest.mark.parametrize("windows", [None, (3, None), (6, 6)])
@torch.no_grad()
def test_a_model_over_small_pages(windows: tuple[int | None, ...] | None) -> None:
    """Two texts of many pages, round their rings several times, against the same texts in one pass."""
    model = from_config({**TINY, "num_key_value_heads": 2, "initializer_range": 0.3}, device="cpu").eval()
    for layer, window in zip(model.model.layers, windows or (None, None), strict=True):
        layer.self_attn.window = window
    texts = [token_ids(34, seed=1), token_ids(29, seed=2)]
    expected = [model.model(text, torch.arange(len(text)), packed([len(text)])) for text in texts]
    config = model.config
    cache = KvCache(
        windows=windows or (None, None),
        rows=2,
        capacity=34,
        pages=32,
        page_size=2,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    beginnings, positions = torch.cat([text[:9] for text in texts]), torch.arange(9).repeat(2)
    begin_prompt(cache, {0: 9, 1: 9})
    states = model.model(beginnings, positions, packed([9, 9]), cache).view(2, 9, -1)
    for row in range(2):
        torch.testing.assert_close(states[row], expected[row][:9], rtol=1e-4, atol=1e-4)
    for at in range(9, 34):
        if at == 29:
            cache.release(1)
        new = torch.stack([text[min(at, len(text) - 1)] for text in texts])
        states = model.model(new, begin_tokens(cache), packed([1, 1]), cache)
        for row in range(2 if at < 29 else 1):
            torch.testing.assert_close(states[row], expected[row][at], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64])
def test_a_captured_pass_follows_what_the_host_decides(page_size: int) -> None:
    """Rows grow over page ends, end, and begin anew between replays; each result is that of the CPU."""
    windows, heads, kv_heads, head_dim = (None, 20), 8, 2, 64
    shape: dict[str, Any] = {"windows": windows, "rows": 3, "capacity": 300, "pages": 40, "page_size": page_size}
    shape.update(num_kv_heads=kv_heads, head_dim=head_dim, dtype=torch.float32)
    on_gpu = KvCache(**shape, device=torch.device("cuda"))
    on_cpu = KvCache(**shape, device=torch.device("cpu"))
    qkv = torch.zeros(3, heads + 2 * kv_heads, head_dim, device="cuda")

    def layers(cache: KvCache, qkv: Tensor) -> Tensor:
        results = []
        for index, window in enumerate(windows):
            layer = cache.layer(index)
            layer.store_(qkv.clone(), None, num_heads=heads)
            results.append(layer.attend(qkv[:, :heads], scale=0.1, window=window, softcap=None))
        return torch.stack(results)

    def prompts(lengths: dict[int, int]) -> None:
        tokens = torch.randn(sum(lengths.values()), *qkv.shape[1:])
        for cache in (on_gpu, on_cpu):
            begin_prompt(cache, lengths)
            for index in range(len(windows)):
                cache.layer(index).store_(tokens.to(cache.lengths.device, copy=True), None, num_heads=heads)

    every_row = torch.arange(3, dtype=torch.int32, device="cuda")
    on_gpu.place_tokens(every_row)  # every row is idle: warms the kernels up
    layers(on_gpu, qkv)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        positions = on_gpu.place_tokens(every_row)
        out = layers(on_gpu, qkv)
    for step in range(90):
        if step in (0, 30, 60):
            prompts({0: {0: 10, 2: 130}, 30: {1: 65, 2: 3}, 60: {0: 200}}[step])
        if step == 45:
            on_gpu.release(0)
            on_cpu.release(0)
        new = torch.randn(qkv.shape)
        qkv.copy_(new)
        on_gpu.count_tokens(range(3))
        graph.replay()
        assert positions.tolist() == begin_tokens(on_cpu).tolist()
        torch.testing.assert_close(out.cpu(), layers(on_cpu, new), rtol=1e-5, atol=1e-5)
