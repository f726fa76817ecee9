# SPDX-License-Identifier: Apache-2.0
"""Reading pickles of numpy arrays, such as detectron2's `.pkl` files, without running anything that they ask for.

A pickle is a program. This interpreter knows the instructions that containers, text, numbers and arrays are made of; the
names that a file may use stand for recorders of our own, so that not even numpy acts on what a file claims. Arrays come
about at the end, out of bytes that were in the file.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict

import numpy as np

_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK POP POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST "
    "APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3"
).split()


class _DType:
    """What a file says of a dtype: its code ("f4") and byte order."""

    def __init__(self, code: str, *flags) -> None:
        if not isinstance(code, str) or code.lstrip("<>=|")[:1] not in ("f", "i", "u", "b"):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}")
        self.code, self.order = code.lstrip("<>=|"), "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """What a file says of an array."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def numpy(self) -> np.ndarray:
        """Raises ValueError where the claims and the bytes do not go together."""
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        dtype = self.dtype.numpy()
        sizes_fit = all(isinstance(n, int) and n >= 0 for n in self.shape) and len(self.shape) <= 32
        if not sizes_fit or math.prod(self.shape) * dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {self.shape} with {len(data)} bytes")
        array = np.frombuffer(data, dtype).reshape(self.shape, order="F" if self.fortran else "C")
        return np.array(array, dtype.newbyteorder("="), order="C")


class _NDArrayType:
    """Stands for the type `numpy.ndarray`, which files name but need not call."""


def _reconstruct(kind, shape, code) -> _Array:
    return _Array()


def _scalar(dtype: _DType, data: bytes | str) -> _Array:
    array = _Array()
    array.__setstate__((1, (), dtype, False, data))
    return array


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How protocol 2 writes b""."""
    return b""


def _ordered(pairs=()) -> OrderedDict:
    return OrderedDict((key, value) for key, value in pairs)


_NAMES = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    ("numpy", "ndarray"): _NDArrayType,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("collections", "OrderedDict"): _ordered,
}
_CALLABLE = (_reconstruct, _scalar, _DType, _encode, _no_bytes, _ordered)


class _Unpickler(pickle._Unpickler):  # Python's own: the C one makes room for whatever memo index a file names
    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _INSTRUCTIONS}

    def find_class(self, module: str, name: str):
        try:
            return _NAMES[module, name]
        except (KeyError, TypeError):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}") from None

    def load_reduce(self) -> None:
        if not any(self.stack[-2] is known for known in _CALLABLE):
            raise pickle.UnpicklingError("a call of something that is no function")
        super().load_reduce()

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], (_DType, _Array)):
            raise pickle.UnpicklingError(f"a state for a {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.REDUCE[0]], dispatch[pickle.BUILD[0]] = load_reduce, load_build


def load_numpy_pickle(data: bytes) -> object:
    """The containers of the pickle `data` with their arrays as numpy arrays; strings of Python 2 are read as Latin-1.

    Raises pickle.UnpicklingError, with "GLOBAL module.name" where the file asks for anything else than arrays, and other
    errors of Python where it is damaged.
    """
    return _arrays(_Unpickler(io.BytesIO(data), encoding="latin1").load())


def _arrays(value):
    """With arrays in place of the recorders, in the top two levels of dictionaries: deeper ones are no weights."""
    convert = lambda v: v.numpy() if isinstance(v, _Array) else v  # noqa: E731
    if not isinstance(value, dict):
        return convert(value)
    inner = lambda v: {k: convert(x) for k, x in v.items()} if isinstance(v, dict) else convert(v)  # noqa: E731
    return {key: inner(item) for key, item in value.items()}
