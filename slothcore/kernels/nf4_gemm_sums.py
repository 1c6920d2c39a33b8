"""What becomes of the sums that nf4_gemm_warps.py has of a tile, or of a part of one; in Gluon, for Hopper.

Where each of two or four programs has an equal part of a tile, it ends up with as large a piece of it: it leaves its
sums of the other pieces, in float32, and adds what the others left of its own. Else a program that begins inside a tile
leaves all of its sums to the program with the first steps of that tile. Either way the order is always the same one.

A program's parts of tiles come before its whole tiles, and what it leaves to another before what it waits for. Those
that have parts of one tile are neighbours, which begin together, so nobody waits in a circle.

A flag says for how many readers a consumer's sums are there; each counts it down, so that it ends at zero again.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

# Its name until Triton 3.6, and since.
warpgroup_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

PIECES = gl.constexpr(4)  # of a tile's tokens, stored one after another: the buffer then fits beside the stages


@gluon.jit
def _piece_pointers(first_ptr, piece: gl.constexpr, TOKENS: gl.constexpr, layout: gl.constexpr):
    """Where a piece of a consumer's sums [64, TOKENS] lies among them: in squares of 8 x 8, as a warp has them."""
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    column = gl.arange(0, TOKENS // PIECES, gl.SliceLayout(0, layout))
    row_ptr = first_ptr + piece * (64 * (TOKENS // PIECES)) + row * 8
    return gl.expand_dims(row_ptr, 1) + gl.expand_dims(column % 8 + column // 8 * 512, 0)


@gluon.jit
def _store_piece(sums, token, output, out_desc, out_buf):
    """Round a piece of a tile and have it stored, from a given token on."""
    tma.store_wait(0)
    out_buf.permute((1, 0)).store(sums.to(out_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [token, output], out_buf)


@gluon.jit
def _await(flag_ptr):
    """Wait until somebody has left sums here, of which this consumer is the only or a last reader, and take note."""
    while gl.atomic_add(flag_ptr, 0, sem="acquire", scope="gpu") == 0:
        pass
    gl.atomic_add(flag_ptr, -1, sem="relaxed", scope="gpu")


@gluon.jit
def _exchange(
    pieces, first, own, sums_ptr, flags_ptr, WHICH: gl.constexpr, TOKENS: gl.constexpr, TOGETHER: gl.constexpr
):  # fmt: skip
    """This program's pieces of a tile whose parts the programs first, first + 1, .. have, TOGETHER of them.

    own: which of them it is. What it gives away leaves registers for what it gets: all is asked for at once.
    """
    KEPT: gl.constexpr = PIECES // TOGETHER
    PIECE: gl.constexpr = 64 * (TOKENS // PIECES)
    own_ptr = sums_ptr + ((first + own) * 2 + WHICH) * (PIECES * PIECE)
    for piece in gl.static_range(PIECES):
        pointers = _piece_pointers(own_ptr, piece, TOKENS, gl.constexpr(pieces[piece].type.layout))
        gl.store(pointers, pieces[piece], mask=own != piece // KEPT)
    warpgroup_barrier()
    gl.atomic_xchg(flags_ptr + (first + own) * 2 + WHICH, TOGETHER - 1, sem="release", scope="gpu")
    kept = ()
    for piece in gl.static_range(KEPT):
        chosen = pieces[piece]
        for other in gl.static_range(1, TOGETHER):
            chosen = gl.where(own == other, pieces[other * KEPT + piece], chosen)
        kept += (chosen,)
    for turn in gl.static_range(1, TOGETHER):
        _await(flags_ptr + (first + (own + turn) % TOGETHER) * 2 + WHICH)
    for turn in gl.static_range(1, TOGETHER):
        other = first + (own + turn) % TOGETHER
        their_ptr = sums_ptr + (other * 2 + WHICH) * (PIECES * PIECE) + own * (KEPT * PIECE)
        added = ()
        for piece in gl.static_range(KEPT):
            pointers = _piece_pointers(their_ptr, piece, TOKENS, gl.constexpr(kept[piece].type.layout))
            added += (kept[piece] + gl.load(pointers, cache_modifier=".cg"),)
        kept = added
    return kept


@gluon.jit
def store_tile(
    sums, tile, first, last, units, share, token, output, out_desc, out_buf, sums_ptr, flags_ptr,
    WHICH: gl.constexpr, TOKENS: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """Store a tile's sums [64, TOKENS] of consumer WHICH, those of its units from first on and before last.

    token, output: where the consumer's 64 outputs of the tile begin. sums_ptr, flags_ptr: a place and a flag for each
    consumer of each program. TOGETHER: as for the kernel.
    """
    program = gl.program_id(0)
    half_0, half_1 = gl.split(gl.permute(gl.reshape(sums, [64, 2, TOKENS // 2]), (0, 2, 1)))
    piece_0, piece_1 = gl.split(gl.permute(gl.reshape(half_0, [64, 2, TOKENS // 4]), (0, 2, 1)))
    piece_2, piece_3 = gl.split(gl.permute(gl.reshape(half_1, [64, 2, TOKENS // 4]), (0, 2, 1)))
    pieces = (piece_0, piece_1, piece_2, piece_3)
    if TOGETHER > 1:
        if last - first < units:
            own = first * TOGETHER // units
            kept = _exchange(pieces, program - own, own, sums_ptr, flags_ptr, WHICH, TOKENS, TOGETHER)
            token += own * (TOKENS // TOGETHER)
            for piece in gl.static_range(PIECES // TOGETHER):
                _store_piece(kept[piece], token + piece * (TOKENS // PIECES), output, out_desc, out_buf)
        else:
            for piece in gl.static_range(PIECES):
                _store_piece(pieces[piece], token + piece * (TOKENS // PIECES), output, out_desc, out_buf)
    elif first > 0:
        own_ptr = sums_ptr + (program * 2 + WHICH) * (64 * TOKENS)
        for piece in gl.static_range(PIECES):
            pointers = _piece_pointers(own_ptr, piece, TOKENS, gl.constexpr(pieces[piece].type.layout))
            gl.store(pointers, pieces[piece])
        warpgroup_barrier()
        gl.atomic_xchg(flags_ptr + program * 2 + WHICH, 1, sem="release", scope="gpu")
    else:
        # Those who have the rest of this tile, in order; none if this program has all of it.
        end = gl.where(last < units, gl.cdiv((tile + 1) * units, share), 0)
        for other in range(program + 1, end):
            _await(flags_ptr + other * 2 + WHICH)
        for piece in gl.static_range(PIECES):
            added = pieces[piece]
            for other in range(program + 1, end):
                their_ptr = sums_ptr + (other * 2 + WHICH) * (64 * TOKENS)
                pointers = _piece_pointers(their_ptr, piece, TOKENS, gl.constexpr(added.type.layout))
                added += gl.load(pointers, cache_modifier=".cg")
            _store_piece(added, token + piece * (TOKENS // PIECES), output, out_desc, out_buf)
