"""Instructions of nf4_stream_kernel.py that Triton has no names for, as PTX of a lane or a warp.

Outputs are numbered first, then inputs. What returns nothing returns a zero. Lanes and fragments are those of
nf4_lanes.py.
"""

from slothcore.kernels.nf4_permute import decoded_pairs

POLICY = "createpolicy.fractional.L2::evict_first.b64 $0, 1.0;"
"""A weight is read once, so it leaves the second-level cache before x, the factors and the keys do."""
LOAD_SHARED = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
EVERYBODY = "cp.async.wait_all; bar.sync 0; mov.b32 $0, $1;"
"""Wait until all that the threads have copied is there, and all threads are."""
WAIT_EARLY = "griddepcontrol.wait; mov.b32 $0, $1;"
SIGNAL_EARLY = "griddepcontrol.launch_dependents; mov.b32 $0, $1;"


def registers(outputs: str, inputs: str) -> str:
    """Constraints, a letter each. Some outputs are written before the last input is read, so none shares a register."""
    return ",".join([f"=&{kind}" for kind in outputs] + list(inputs))


def base() -> str:
    """$0 is the address $1 in the shared memory of the program."""
    return _scope("mov.u32 $0, global_smem;", "add.u32 $0, $0, $1;")


def fetch(*, nested: bool) -> str:
    """Copies a unit: to $1 and $2, where its rows 0-3 and 4-7 go, from $3-$6; if $12 is not zero.

    Lanes with $13 copy codes of absmax, or absmax, to $7 from $8, and scales to $9 from $10. $11 is the policy.
    """
    lines = [".reg .pred there, scales;", "setp.ne.b32 there, $12, 0;", "setp.ne.and.b32 scales, $13, 0, there;"]
    lines.append("bar.warp.sync 0xffffffff;")  # all lanes have read what the unit takes the place of
    for i in range(4):
        target = f"[${1 + i % 2} + {512 * i}]"
        lines.append(f"@there cp.async.cg.shared.global.L2::cache_hint {target}, [${3 + i}], 16, $11;")
    if nested:
        lines.append("@scales cp.async.ca.shared.global [$7], [$8], 4;")
        lines.append("@scales cp.async.ca.shared.global [$9], [$10], 4;")
    else:
        lines.append("@scales cp.async.cg.shared.global [$7], [$8], 16;")
    return _nothing(*lines, "cp.async.commit_group;")


def read(*, nested: bool, outstanding: int) -> str:
    """Reads a unit as soon as no more copies than so many are outstanding.

    $0-$15 are the words of rows r and r + 8, then two codes of absmax and two scales, or two absmax. The inputs: where
    the even and the odd pieces of the row are, where its codes or absmax, and where its scales.
    """
    first = 20 if nested else 18
    lines = [f"cp.async.wait_group {outstanding};", "bar.warp.sync 0xffffffff;"]
    if nested:
        lines += [f"ld.shared.u8 $16, [${first + 2}];", f"ld.shared.u8 $17, [${first + 2} + 32];"]
        lines += [f"ld.shared.f32 $18, [${first + 3}];", f"ld.shared.f32 $19, [${first + 3} + 32];"]
    else:
        lines += [f"ld.shared.f32 $16, [${first + 2}];", f"ld.shared.f32 $17, [${first + 2} + 128];"]
    for i in range(4):
        lines.append(f"ld.shared.v4.b32 {_vector(4 * i)}, [${first + i % 2} + {1024 * (i // 2)}];")
    return _scope(*lines)


def multiply(dtype: str, *, tabled: bool) -> str:
    """Decodes 8 weights of row r and 8 of row r + 8, and multiplies them by x.

    Two sets of four sums, which are a shorter chain of dependent products than one; then the inputs: those sums; the
    word of row r and its absmax, those of row r + 8, the lane's table and the bytes of an entry, or the words with the
    planes behind each; four registers of x.
    """
    first = 16
    lines = [".reg .b32 a<4>, b<4>;"]
    if tabled:
        lines += [".reg .b32 at;", ".reg .f32 one, two;"]
        for word, name in ((first, "a"), (first + 2, "b")):
            for i in range(4):
                # By a multiplication, which is not made where permutes are.
                lines += [f"prmt.b32 at, ${word}, 0, {0x4440 + i};", f"mad.lo.u32 at, at, ${first + 5}, ${first + 4};"]
                lines += ["ld.shared.v2.f32 {one, two}, [at];"]
                lines += [f"mul.rn.f32 one, one, ${word + 1};", f"mul.rn.f32 two, two, ${word + 1};"]
                lines += [f"cvt.rn.{dtype}x2.f32 {name}{i}, two, one;"]
        x = first + 6
    else:
        for word, name in ((first, "a"), (first + 9, "b")):
            lines += ["{", *decoded_pairs(word, [f"{name}{i}" for i in range(4)]), "}"]
        x = first + 18
    for half in range(2):
        weights = f"{{a{2 * half}, b{2 * half}, a{2 * half + 1}, b{2 * half + 1}}}"
        pair = f"{{${x + 2 * half}, ${x + 2 * half + 1}}}"
        lines.append(_mma(dtype, _vector(4 * half), weights, pair, _vector(8 + 4 * half)))
    return _scope(*lines)


def multiply_registers(*, tabled: bool) -> str:
    """Constraints of `multiply`."""
    return registers("f" * 8, "f" * 8 + ("rfrfrr" if tabled else "r" * 18) + "rrrr")


def lora(dtype: str) -> str:
    """$0-$3 are the sums $4-$7 and the product of B and u.

    $8-$11 and $12-$15 are four ranks of B's rows r and r + 8, $16-$19 those of u.
    """
    lines = [".reg .b32 a<4>, b<2>;"]
    for name, first in (("a0", 8), ("a2", 10), ("a1", 12), ("a3", 14), ("b0", 16), ("b1", 18)):
        lines.append(f"cvt.rn.{dtype}x2.f32 {name}, ${first + 1}, ${first};")
    return _scope(*lines, _mma(dtype, _vector(0), "{a0, a1, a2, a3}", "{b0, b1}", _vector(4)))


def give() -> str:
    """Stores the sums $6-$9 to $1, as soon as parity $3 of barrier $2 is over; lane zero ($5) then arrives at $4."""
    lines = [".reg .pred done, one;", "wait_for_room:", "mbarrier.try_wait.parity.shared::cta.b64 done, [$2], $3;"]
    lines += ["@!done bra wait_for_room;", f"st.shared.v4.f32 [$1], {_vector(6)};"]
    lines += ["bar.warp.sync 0xffffffff;", "setp.eq.b32 one, $5, 0;"]
    return _nothing(*lines, "@one mbarrier.arrive.shared::cta.b64 _, [$4];")


def take(warps: int) -> str:
    """$0-$3 are what all warps gave, from $4 on, added up in their order, as soon as parity $6 of barrier $5 is over.

    Lane zero ($8) then arrives at barrier $7. All that only where $9 is not zero, else the outputs are zeros.
    """
    lines = [".reg .pred done, one, other;", ".reg .f32 v<4>;"]
    lines += [f"mov.f32 ${i}, 0f00000000;" for i in range(4)]
    lines += ["setp.eq.b32 other, $9, 0;", "@other bra nothing;", "wait_for_sums:"]
    lines += ["mbarrier.try_wait.parity.shared::cta.b64 done, [$5], $6;", "@!done bra wait_for_sums;"]
    for warp in range(warps):
        lines.append(f"ld.shared.v4.f32 {{v0, v1, v2, v3}}, [$4 + {512 * warp}];")
        lines += [f"add.rn.f32 ${i}, ${i}, v{i};" for i in range(4)]
    lines += ["bar.warp.sync 0xffffffff;", "setp.eq.b32 one, $8, 0;"]
    return _scope(*lines, "@one mbarrier.arrive.shared::cta.b64 _, [$7];", "nothing:")


def copy_x() -> str:
    """16 bytes from $1 to $2 in shared memory; they are there behind EVERYBODY."""
    return _nothing("cp.async.cg.shared.global [$2], [$1], 16;")


def store_entry() -> str:
    """The pair $2, $3 twice to $1."""
    return _nothing("st.shared.v4.f32 [$1], {$2, $3, $2, $3};")


def make_barriers(warps: int) -> str:
    """From $1 on: two at which the warps arrive, and two at which one does; by thread ($2) zero."""
    arrivals = (warps, warps, 1, 1)
    inits = [f"@one mbarrier.init.shared::cta.b64 [$1 + {8 * i}], {n};" for i, n in enumerate(arrivals)]
    return _nothing(".reg .pred one;", "setp.eq.b32 one, $2, 0;", *inits)


def _scope(*lines: str) -> str:
    return "\n".join(["{", *lines, "}"])


def _nothing(*lines: str) -> str:
    return _scope(*lines, "mov.b32 $0, 0;")


def _vector(first: int) -> str:
    return "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"


def _mma(dtype: str, out: str, left: str, right: str, summed: str) -> str:
    return f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {out}, {left}, {right}, {summed};"
