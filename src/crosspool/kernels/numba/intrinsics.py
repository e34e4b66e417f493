"""What compiled code needs of the machine and Numba does not offer: raw memory, atomics, waiting.

Addresses are int64. Words of the queues are int64 at addresses that are multiples of 8; the memory order of
each access is in its name (C++ memory model, as LLVM has it).
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from crosspool.kernels.numba.compile import ENTRY_ARGUMENTS, inline

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32 = ir.FloatType()
VOID = ir.VoidType()

SYSCALLS = {
    "x86_64": {"write": 1, "futex": 202, "sched_setaffinity": 203},
    "aarch64": {"write": 64, "futex": 98, "sched_setaffinity": 122},
}
MOST_CORES = 1024
FUTEX_WAIT_PRIVATE = 128
FUTEX_WAKE_PRIVATE = 129
CLOCK_MONOTONIC = 1
NANOSECONDS = 1_000_000_000


def declared(builder: Any, name: str, result: Any, arguments: list[Any], variadic: bool = False) -> Any:
    """The external function or LLVM intrinsic ``name`` in the module that is being built."""
    kind = ir.FunctionType(result, arguments, var_arg=variadic)
    return cgutils.get_or_insert_function(builder.module, kind, name)


# -- memory -------------------------------------------------------------------------------------------------


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer, for carray."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], I8.as_pointer())

    return types.voidptr(types.int64), generate


@inline
def address_of(array):
    """Where an array's memory begins."""
    return np.int64(array.ctypes.data)


@inline
def floats(address, count):
    """float32 [count] at an address."""
    return carray(pointer(address), (count,), np.float32)


@inline
def halves(address, count):
    """uint16 [count] at an address: the bits of bfloat16 or float16."""
    return carray(pointer(address), (count,), np.uint16)


@inline
def words(address, count):
    """int64 [count] at an address."""
    return carray(pointer(address), (count,), np.int64)


@intrinsic
def call_entry(typing: Any, address: Any, arguments: Any) -> Any:
    """Call the compiled function at an address (compile.Entry) with a tuple of int64; returns its result."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(I64, [I64] * ENTRY_ARGUMENTS)
        function = builder.inttoptr(values[0], kind.as_pointer())
        return builder.call(function, cgutils.unpack_tuple(builder, values[1]))

    if not isinstance(arguments, types.UniTuple) or arguments.count != ENTRY_ARGUMENTS:
        return None
    return types.int64(types.int64, types.UniTuple(types.int64, ENTRY_ARGUMENTS)), generate


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address; nothing happens if it is not there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = declared(builder, "llvm.prefetch.p0", VOID, [I8.as_pointer(), I32, I32, I32])
        place = builder.inttoptr(arguments[0], I8.as_pointer())
        builder.call(function, [place, I32(0), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def float_of_bits(typing: Any, bits: Any) -> Any:
    """The float32 whose bits these (uint32) are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.uint32), generate


@intrinsic
def bits_of_float(typing: Any, value: Any) -> Any:
    """The bits (uint32) of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I32)

    return types.uint32(types.float32), generate


@intrinsic
def float_of_half(typing: Any, bits: Any) -> Any:
    """The value of a float16 given by its bits (uint16)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), F32)

    return types.float32(types.uint16), generate


@intrinsic
def half_of_float(typing: Any, value: Any) -> Any:
    """The bits (uint16) of the float16 nearest to a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), I16)

    return types.uint16(types.float32), generate


# -- atomics ------------------------------------------------------------------------------------------------


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def load_acquire(typing: Any, address: Any) -> Any:
    """The word at an address, and everything that was written before it was released."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_word(builder, arguments[0]), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def store_release(typing: Any, address: Any, value: Any) -> Any:
    """Write a word after everything written before it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _word(builder, arguments[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to a word (acquire and release); returns what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _word(builder, arguments[0]), arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def exchange(typing: Any, address: Any, value: Any) -> Any:
    """Replace a word (sequentially consistent); returns what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("xchg", _word(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def full_fence(typing: Any) -> Any:
    """Order every access before it with every access after it (sequentially consistent)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


# -- waiting ------------------------------------------------------------------------------------------------


@intrinsic
def pause(typing: Any) -> Any:
    """Tell the core that this is a loop that waits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = "llvm.x86.sse2.pause" if platform.machine() == "x86_64" else "llvm.aarch64.hint"
        if platform.machine() == "x86_64":
            builder.call(declared(builder, name, VOID, []), [])
        else:
            builder.call(declared(builder, name, VOID, [I32]), [I32(1)])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_core(typing: Any) -> Any:
    """Let another thread have this core, if one wants it (sched_yield)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.call(declared(builder, "sched_yield", I32, []), [])
        return context.get_dummy_value()

    return types.void(), generate


def _syscall(builder: Any, name: str, arguments: list[Any]) -> Any:
    function = declared(builder, "syscall", I64, [I64], variadic=True)
    return builder.call(function, [I64(SYSCALLS[platform.machine()][name]), *arguments])


@intrinsic
def now(typing: Any) -> Any:
    """Nanoseconds on the monotonic clock, which is that of time.monotonic_ns."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        time = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        function = declared(builder, "clock_gettime", I32, [I32, I8.as_pointer()])
        builder.call(function, [I32(CLOCK_MONOTONIC), builder.bitcast(time, I8.as_pointer())])
        seconds, rest = (builder.load(builder.gep(time, [I32(0), I32(part)])) for part in (0, 1))
        return builder.add(builder.mul(seconds, I64(NANOSECONDS)), rest)

    return types.int64(), generate


@intrinsic
def write_file(typing: Any, file: Any, address: Any, count: Any) -> Any:
    """Write bytes at an address to a file descriptor (write(2)). Returns how many were, -1 for none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _syscall(builder, "write", list(arguments))

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def sleep_on(typing: Any, address: Any, seen: Any, timeout: Any) -> Any:
    """Sleep until ``wake_all`` of this address, but not if its low 32 bits differ from those of ``seen``,
    and for ``timeout`` nanoseconds at most."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, expected, nanoseconds = arguments
        time = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        whole = builder.sdiv(nanoseconds, I64(NANOSECONDS))
        rest = builder.srem(nanoseconds, I64(NANOSECONDS))
        for part, value in enumerate((whole, rest)):
            builder.store(value, builder.gep(time, [I32(0), I32(part)]))
        low = builder.and_(expected, I64(0xFFFFFFFF))
        where = builder.ptrtoint(time, I64)
        _syscall(builder, "futex", [place, I64(FUTEX_WAIT_PRIVATE), low, where, I64(0), I64(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def wake_all(typing: Any, address: Any) -> Any:
    """Wake every thread that sleeps on an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        everybody = I64(2**31 - 1)
        _syscall(builder, "futex", [arguments[0], I64(FUTEX_WAKE_PRIVATE), everybody, I64(0), I64(0), I64(0)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def move_thread(typing: Any, thread: Any, core: Any) -> Any:
    """Let a thread, by the system's number of it, run on one core alone (sched_setaffinity(2)). ``core`` is
    below MOST_CORES. Returns 0, or -1 if the system does not let it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, place = arguments
        kind = ir.ArrayType(I64, MOST_CORES // 64)
        mask = cgutils.alloca_once(builder, kind)
        word = builder.gep(mask, [I32(0), builder.lshr(place, I64(6))])
        builder.store(kind(None), mask)
        builder.store(builder.shl(I64(1), builder.and_(place, I64(63))), word)
        return _syscall(
            builder, "sched_setaffinity", [number, I64(MOST_CORES // 8), builder.ptrtoint(mask, I64)]
        )

    return types.int64(types.int64, types.int64), generate
