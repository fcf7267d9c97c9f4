"""Eight float64 numbers as one value inside a kernel, so that eight rows are filtered side by side.

numba knows no vectors, and its compiler packs neighbouring scalars only by luck. Here a value of type
``Vector`` is one LLVM vector: it stays in registers, and each of ``+ - * /`` is one instruction where the
processor has vectors that wide, a few where it has not. A *tile* is an array of 128 float64: sixteen tokens of
eight rows, token by token. ``transpose_in`` and ``transpose_out`` move tiles between rows in memory and that order.
Sixteen float32 are one line of a cache: rows whose length is a power of two share their places in the first-level
cache, where eight lines read and eight written would push each other out between two halves of a line.

Operands are vectors, or one of them a float64. Indices are not checked. Importing this module imports numba.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

N = 8
F64, BIT, I8, I32 = ir.DoubleType(), ir.IntType(1), ir.IntType(8), ir.IntType(32)
LLVM_VECTOR, LLVM_MASK = ir.VectorType(F64, N), ir.VectorType(BIT, N)
FREEDOMS = ("contract", "nsz", "arcp")  # as in jit.py


class Vector(types.Type):
    """Eight float64."""


class Mask(types.Type):
    """Eight booleans."""


VECTOR, MASK = Vector("vector"), Mask("mask")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, LLVM_VECTOR)


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, LLVM_MASK)


def _constant(values: list[int]) -> Any:
    return ir.Constant(ir.VectorType(I32, len(values)), values)


def _same(builder: Any, x: Any) -> Any:
    undefined = ir.Constant(LLVM_VECTOR, ir.Undefined)
    one = builder.insert_element(undefined, x, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, undefined, _constant([0] * N))


def _arithmetic(function: Any, instruction: str) -> None:
    @intrinsic
    def both(typing: Any, a: Any, b: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pairs = zip(arguments, signature.args, strict=True)
            x, y = (v if kind == VECTOR else _same(builder, v) for v, kind in pairs)
            return getattr(builder, instruction)(x, y, flags=FREEDOMS)

        return VECTOR(a, b), build

    @overload(function)
    def operation(a, b):  # numba wants the signature of what it returns
        if VECTOR in (a, b) and {a, b} <= {VECTOR, types.float64}:
            return lambda a, b: both(a, b)
        return None


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _arithmetic(_function, _instruction)


@intrinsic
def broadcast(typing: Any, x: Any) -> Any:
    """``x`` eight times."""
    return VECTOR(types.float64), lambda context, builder, signature, arguments: _same(builder, arguments[0])


@intrinsic
def is_number(typing: Any, x: Any) -> Any:
    """Where x is not NaN."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fcmp_ordered("ord", arguments[0], arguments[0])

    return MASK(VECTOR), build


@intrinsic
def is_positive(typing: Any, x: Any) -> Any:
    """Where x > 0."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fcmp_ordered(">", arguments[0], ir.Constant(LLVM_VECTOR, [0.0] * N))

    return MASK(VECTOR), build


@intrinsic
def choose(typing: Any, where: Any, a: Any, b: Any) -> Any:
    """``a`` where true, else ``b``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return VECTOR(MASK, VECTOR, VECTOR), build


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return context.make_array(kind)(context, builder, array).data


def _place(builder: Any, data: Any, index: Any, element: Any) -> Any:
    """Pointer to eight elements from ``index`` on."""
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(element, N).as_pointer())


def _tile_row(builder: Any, data: Any, i: int) -> Any:
    """The i-th token of a tile."""
    return _place(builder, data, ir.Constant(ir.IntType(64), N * i), F64)


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Eight vectors of eight transposed: blocks of 1, 2, 4 elements change places across the diagonal."""
    for size in (1, 2, 4):
        low = _constant([c if not c & size else (c ^ size) + N for c in range(N)])
        high = _constant([c | size if not c & size else c + N for c in range(N)])
        for i in (i for i in range(N) if not i & size):
            a, b = rows[i], rows[i | size]
            rows[i], rows[i | size] = builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)
    return rows


def _load_vector(builder: Any, place: Any, bits: int) -> Any:
    return builder.load(place, align=bits // 8)


def _positions(builder: Any, first: Any, t: Any) -> list[list[Any]]:
    """The eight places ``first[l] + t``, and the eight that are eight tokens later."""
    at = [builder.add(builder.load(builder.gep(first, [ir.Constant(I32, i)])), t) for i in range(N)]
    return [at, [builder.add(position, ir.Constant(ir.IntType(64), N)) for position in at]]


def _rows(builder: Any, data: Any, element: Any, bits: int, positions: list[Any]) -> list[Any]:
    return [_load_vector(builder, _place(builder, data, position, element), bits) for position in positions]


def _fill(builder: Any, tile: Any, half: int, rows: list[Any], widen: bool) -> None:
    """Half a tile."""
    for i, row in enumerate(_transposed(builder, rows)):
        value = builder.fpext(row, LLVM_VECTOR) if widen else row
        builder.store(value, _tile_row(builder, tile, N * half + i), align=8)


@intrinsic
def transpose_in(typing: Any, source: Any, first: Any, t: Any, tile: Any) -> Any:
    """``tile[8 i + l] = source[first[l] + t + i]`` for sixteen i and eight l. source: float32 or float64."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        data, begin, to = (_data(context, builder, kinds[i], arguments[i]) for i in (0, 1, 3))
        bits = kinds[0].dtype.bitwidth
        element = context.get_data_type(kinds[0].dtype)
        for half, positions in enumerate(_positions(builder, begin, arguments[2])):
            _fill(builder, to, half, _rows(builder, data, element, bits, positions), bits == 32)
        return context.get_dummy_value()

    return types.void(source, first, types.intp, tile), build


@intrinsic
def transpose_in_seen(typing: Any, source: Any, mask: Any, first: Any, t: Any, tile: Any) -> Any:
    """As :func:`transpose_in` with NaN where the mask (uint8) is 0; False if a number that is seen is NaN."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        data, marks, begin, to = (_data(context, builder, kinds[i], arguments[i]) for i in (0, 1, 2, 4))
        bits = kinds[0].dtype.bitwidth
        element = context.get_data_type(kinds[0].dtype)
        nan = ir.Constant(ir.VectorType(element, N), [float("nan")] * N)
        none, bad = ir.Constant(ir.VectorType(I8, N), [0] * N), ir.Constant(LLVM_MASK, [0] * N)
        for half, positions in enumerate(_positions(builder, begin, arguments[3])):
            rows, values = [], _rows(builder, data, element, bits, positions)
            for row, seen in zip(values, _rows(builder, marks, I8, 8, positions), strict=True):
                flag = builder.icmp_unsigned("!=", seen, none)
                bad = builder.or_(bad, builder.and_(flag, builder.fcmp_unordered("uno", row, row)))
                rows.append(builder.select(flag, row, nan))
            _fill(builder, to, half, rows, bits == 32)
        return builder.icmp_unsigned("==", builder.bitcast(bad, I8), ir.Constant(I8, 0))

    return types.boolean(source, mask, first, types.intp, tile), build


@intrinsic
def transpose_in_mask(typing: Any, mask: Any, first: Any, t: Any, tile: Any) -> Any:
    """``tile[8 i + l] = 1.0 if mask[first[l] + t + i] else 0.0``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        marks, begin, to = (_data(context, builder, kinds[i], arguments[i]) for i in (0, 1, 3))
        none = ir.Constant(ir.VectorType(I8, N), [0] * N)
        for half, positions in enumerate(_positions(builder, begin, arguments[2])):
            for i, row in enumerate(_transposed(builder, _rows(builder, marks, I8, 8, positions))):
                seen = builder.uitofp(builder.icmp_unsigned("!=", row, none), LLVM_VECTOR)
                builder.store(seen, _tile_row(builder, to, N * half + i), align=8)
        return context.get_dummy_value()

    return types.void(mask, first, types.intp, tile), build


@intrinsic
def transpose_out(typing: Any, tile: Any, target: Any, first: Any, t: Any) -> Any:
    """``target[first[l] + t + i] = tile[8 i + l]``, rounded to the type of target."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        data, to, begin = (_data(context, builder, kinds[i], arguments[i]) for i in range(3))
        bits = kinds[1].dtype.bitwidth
        element = context.get_data_type(kinds[1].dtype)
        halves = []
        for half in range(2):
            rows = [_load_vector(builder, _tile_row(builder, data, N * half + i), 64) for i in range(N)]
            if bits == 32:
                rows = [builder.fptrunc(row, ir.VectorType(element, N)) for row in rows]
            halves.append(_transposed(builder, rows))
        first_half, second = _positions(builder, begin, arguments[3])
        for lane in range(N):  # both halves of a line together
            for row, position in ((halves[0][lane], first_half[lane]), (halves[1][lane], second[lane])):
                builder.store(row, _place(builder, to, position, element), align=bits // 8)
        return context.get_dummy_value()

    return types.void(tile, target, first, types.intp), build


@intrinsic
def load(typing: Any, tile: Any, i: Any) -> Any:
    """Vector of the i-th token of a tile, or of any float64 array with eight numbers a token."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = _data(context, builder, signature.args[0], arguments[0])
        index = builder.mul(arguments[1], ir.Constant(ir.IntType(64), N))
        return _load_vector(builder, _place(builder, data, index, F64), 64)

    return VECTOR(tile, types.intp), build


@intrinsic
def store(typing: Any, tile: Any, i: Any, x: Any) -> Any:
    """Write what :func:`load` reads."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = _data(context, builder, signature.args[0], arguments[0])
        index = builder.mul(arguments[1], ir.Constant(ir.IntType(64), N))
        builder.store(arguments[2], _place(builder, data, index, F64), align=8)
        return context.get_dummy_value()

    return types.void(tile, types.intp, VECTOR), build
