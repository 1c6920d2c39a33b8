"""Blocks of rows and columns that the attention kernels load, multiply and store; nothing here is launched.

A head is held in one or two pieces, [BLOCK, WIDE] and [BLOCK, TAIL]: see Columns in `attention.py`.
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1e30)


@triton.jit
def locate_tile(cu_seqlens_ptr, tile, documents, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """First row of the document that owns `tile` (int64), its length, and the tile's first row inside it.

    SEARCH is off where documents are about equally long: tile numbers run over the documents first, so that blocks
    of equal cost are neighbours. With SEARCH, document d owns the numbers from cu_seqlens[d] // BLOCK + d on: enough
    for its blocks, at most one too many. A number too many gets a row beyond the length.
    """
    if SEARCH:
        document = tl.full((), -1, tl.int32)
        for first in range(0, documents, 256):
            candidates = first + tl.arange(0, 256)
            starts = tl.load(cu_seqlens_ptr + candidates, mask=candidates < documents, other=2**30)
            document += tl.sum((starts // BLOCK + candidates <= tile).to(tl.int32), axis=0)
        start = tl.load(cu_seqlens_ptr + document)
        row = (tile - start // BLOCK - document) * BLOCK
    else:
        document = tile % documents
        start = tl.load(cu_seqlens_ptr + document)
        row = tile // documents * BLOCK
    length = tl.load(cu_seqlens_ptr + document + 1) - start
    return start.to(tl.int64), length, row


@triton.jit
def _load_piece(ptr, row, length, stride_row, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr,
                WIDTH: tl.constexpr, CHECK_ROWS: tl.constexpr):  # fmt: skip
    """[BLOCK, WIDTH] of the rows at `ptr`, from column FIRST on; see `load_rows`."""
    rows = tl.arange(0, BLOCK)
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = ptr + rows[:, None] * stride_row + columns[None, :]
    if FIRST + WIDTH > HEAD_DIM:
        if CHECK_ROWS:
            piece = tl.load(pointers, mask=(row + rows < length)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
        else:
            piece = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    elif CHECK_ROWS:
        piece = tl.load(pointers, mask=(row + rows < length)[:, None], other=0.0)
    else:
        piece = tl.load(pointers)
    return piece


@triton.jit
def load_rows(
    ptr, start, row, length, stride_row, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    TAIL: tl.constexpr, CHECK_ROWS: tl.constexpr
):  # fmt: skip
    """BLOCK rows of one head from `row` of the document at `start`, in pieces; zero outside document and head.

    Without CHECK_ROWS all rows lie in the document. Reading a neighbour's rows, even to multiply them by zero, would
    let its infinities and NaNs through.
    """
    ptr += (start + row) * stride_row
    wide = _load_piece(ptr, row, length, stride_row, HEAD_DIM, BLOCK, 0, WIDE, CHECK_ROWS)
    if TAIL == 0:
        return (wide,)
    else:
        return (wide, _load_piece(ptr, row, length, stride_row, HEAD_DIM, BLOCK, WIDE, TAIL, CHECK_ROWS))


@triton.jit
def load_block(
    ptr, desc, column, start, row, length, stride_row, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    TAIL: tl.constexpr, CHECK_ROWS: tl.constexpr
):  # fmt: skip
    """`load_rows`, but by the copy engine where there is a descriptor: it spares the program the addresses.

    The copy engine knows nothing of documents, so with a descriptor all rows must lie in this one. It finds the head
    by its first column, whereas `ptr` points to the head already.
    """
    if desc is None:
        return load_rows(ptr, start, row, length, stride_row, HEAD_DIM, BLOCK, WIDE, TAIL, CHECK_ROWS)
    else:
        return (desc.load([(start + row).to(tl.int32), column]),)


@triton.jit
def _store_piece(ptr, piece, row, length, stride_row, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
                 FIRST: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    rows = tl.arange(0, BLOCK)
    columns = FIRST + tl.arange(0, WIDTH)
    mask = (row + rows < length)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(ptr + rows[:, None] * stride_row + columns[None, :], piece.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(
    ptr, pieces, start, row, length, stride_row, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    TAIL: tl.constexpr
):  # fmt: skip
    """Write what of `pieces` lies in document and head, rounded to the dtype of `ptr`."""
    ptr += (start + row) * stride_row
    _store_piece(ptr, pieces[0], row, length, stride_row, HEAD_DIM, BLOCK, 0, WIDE)
    if TAIL > 0:
        _store_piece(ptr, pieces[1], row, length, stride_row, HEAD_DIM, BLOCK, WIDE, TAIL)


@triton.jit
def zero_rows(BLOCK: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr):
    """Pieces of [BLOCK, D] float32 sums."""
    wide = tl.zeros([BLOCK, WIDE], dtype=tl.float32)
    if TAIL == 0:
        return (wide,)
    else:
        return (wide, tl.zeros([BLOCK, TAIL], dtype=tl.float32))


@triton.jit
def scale_rows(pieces, factor):
    """Every piece times `factor`, a number or a column."""
    if len(pieces) == 1:
        return (pieces[0] * factor,)
    else:
        return (pieces[0] * factor, pieces[1] * factor)


@triton.jit
def add_rows(a, b):
    """a + b."""
    if len(a) == 1:
        return (a[0] + b[0],)
    else:
        return (a[0] + b[0], a[1] + b[1])


@triton.jit
def row_products(a, b):
    """[BLOCK] float32: each row of `a` with the same row of `b`."""
    product = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), axis=1)
    if len(a) == 2:
        product += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), axis=1)
    return product


@triton.jit
def _add_product(sums, weights, rows):
    """sums + weights rows.

    Products of float32 are summed one after another, sums first: along a whole document, or a head of 256 numbers, that
    is a chain so long that its rounding shows. So each block has a sum of its own. It is added by an fma, because the
    compiler turns the addition of a product into a product that starts from the other summand.
    """
    if weights.dtype == tl.float32:
        return tl.fma(tl.dot(weights, rows, input_precision="ieee"), 1.0, sums)
    else:
        return tl.dot(weights, rows, sums, input_precision="ieee")


@triton.jit
def dot_rows(a, b):
    """a b^T of two blocks of rows in pieces: each row of `a` with each of `b`."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) == 2:
        product = _add_product(product, a[1], tl.trans(b[1]))
    return product


@triton.jit
def add_weighted_rows(sums, weights, rows):
    """sums + weights rows, with `sums` and `rows` in pieces."""
    wide = _add_product(sums[0], weights, rows[0])
    if len(rows) == 1:
        return (wide,)
    else:
        return (wide, _add_product(sums[1], weights, rows[1]))


@triton.jit
def visible(queries, keys, window, WINDOWED: tl.constexpr):
    """Which keys each query sees; the two broadcast against each other. Keys past the end lie after every query."""
    seen = keys <= queries
    if WINDOWED:
        seen = seen & (queries - keys < window)
    return seen
