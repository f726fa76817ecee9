# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs: compiled for the CPU, CUDA, Triton, or the PyTorch reference.

An op asks `choice = choose(name, backend, tensors...)`, within a function that `planned` decorates, and runs
`call(choice, op, ...)`. What is there is found out by itself: a compiled kernel is there when its library registered `pyvseg::<op>` for the device, a Triton one when
`pyvseg/kernels/<op>.py` exists. Triton's are `pyvseg_triton::<op>`, custom ops of the same schema, fake and gradient:
`register_fake` and `register_autograd` take the op's bare name and serve both.
"""

import functools
import importlib
import importlib.util
import os
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from pyvseg.errors import PyvsegError
from pyvseg.ops import _measured

BACKENDS = ("cpu", "cuda", "triton", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what kernels take; the reference takes every floating dtype


def _load_extension() -> tuple[ModuleType | None, str]:
    """The module `pyvseg._C`, whose import registers the ops, or why it is not there."""
    try:
        from pyvseg import _C
    except ImportError as error:
        return None, f"pyvseg._C cannot be loaded ({error}); reinstall with `pip install --no-build-isolation .`"
    if isa := os.environ.get("PYVSEG_ISA"):
        try:
            _C.set_isa(isa)
        except ValueError as error:
            raise PyvsegError(f"PYVSEG_ISA: {error}; this machine has {', '.join(_C.isas())}") from None
    return _C, ""


extension, _extension_missing = _load_extension()
_wish = os.environ.get("PYVSEG_BACKEND", "auto")
if _wish not in ("auto", *BACKENDS):
    raise PyvsegError(f"PYVSEG_BACKEND={_wish} is not one of auto, {', '.join(BACKENDS)}")


_warned: set[tuple[str, str]] = set()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """All ops of the process use this backend within the block: "auto", "cpu", "cuda", "triton" or "reference"."""
    global _wish
    before, _wish = _wish, _checked(name)
    try:
        yield
    finally:
        _wish = before


def _checked(name: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


@functools.cache
def _cuda_library_missing() -> str:
    """Loads `pyvseg._C_cuda` on a machine with a GPU; the reason where that cannot be."""
    found = importlib.util.find_spec("pyvseg._C_cuda")
    if found is None:
        return "built without CUDA (no nvcc at build time)"
    if not torch.cuda.is_available():
        return "no GPU, or torch without CUDA"
    try:
        torch.ops.load_library(found.origin)
    except OSError as error:
        return f"pyvseg._C_cuda cannot be loaded ({error})"
    return ""


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton runs in its interpreter, which serves CPU tensors too; for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def missing(op: str, name: str) -> str:
    """Why this backend of the op cannot run here; empty when it can."""
    return _missing(op, name, _libraries.get(name, ""))


@functools.cache
def _missing(op: str, name: str, library: str) -> str:
    if name == "reference":
        return ""
    if name == "triton" and not _extension_missing:
        if importlib.util.find_spec(f"pyvseg.kernels.{op}") is None:
            return "no Triton kernel for this op"
        if not torch.cuda.is_available() and not interpreting():
            return "no GPU, or torch without CUDA"
        return "" if importlib.util.find_spec("triton") else "triton is not installed"
    reason = _extension_missing or (_cuda_library_missing() if name == "cuda" else "")
    if reason:
        return reason
    if not hasattr(torch.ops.pyvseg, op):
        return "not in the compiled extension, which is older than this op; reinstall"
    there = torch._C._dispatch_has_kernel_for_dispatch_key(f"{library}::{op}", name.upper())
    return "" if there else f"no {name} kernel for this op"


@torch.compiler.assume_constant_result
def _warn(op: str, device: str, slower: str) -> None:
    if (op, device) in _warned or device == "meta":
        return
    file = _fakes[op].__module__.rpartition(".")[2] if op in _fakes else op
    if device == "cuda" and not importlib.util.find_spec(f"pyvseg.kernels.{file}"):
        return  # nobody wrote one: there PyTorch's own operations are near the best
    _warned.add((op, device))
    reason = missing(op, device) if device in BACKENDS else f"no kernels for {device} tensors"
    warnings.warn(f"pyvseg.ops.{op} runs on the PyTorch reference, about {slower} slower: {reason}", stacklevel=6)


def planned(plan: Callable[..., str]) -> Callable[..., str]:
    """Decorates the checks and the choice of backend of an op, `plan(*its arguments)`, which may look at all of them but the
    values of tensors: it runs once for every signature of a call, and what it returned is known from then on.
    """
    known: dict[bytes, str] = {}

    @functools.wraps(plan)
    def remembered(*args) -> str:
        if extension is None or torch.compiler.is_compiling() or _calls is not None:
            return plan(*args)
        signature = extension.signature(_wish, torch.is_grad_enabled(), args)
        choice = known.get(signature)
        if choice is None:
            choice = plan(*args)
            if len(known) >= _KNOWN:
                known.clear()
            if signature is not None:
                known[signature] = choice
        return choice

    _plans.append(known)
    return remembered


_KNOWN = 4096  # signatures of an op
_plans: list[dict[bytes, str]] = []


def forget() -> None:
    """All plans are made anew: after a change of what backends there are."""
    for known in _plans:
        known.clear()


def choose(op: str, name: str, *tensors: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES, slower: str, few: float = 0, lost: bool = False) -> str:
    """The backend for these tensors: `name`, or what the environment and `backend()` say, or the fastest that can.

    With gradients on a CPU the fastest is the reference up to `few` elements: an op of ours calls Python in the backward.
    So it is, with gradients or without, for problems that the op knows as `lost`.
    """
    device = tensors[0].device.type
    fits = all(t.dtype in dtypes for t in tensors)
    name = _wish if _checked(name) == "auto" else name
    if name == "auto":
        if not fits or (device == "cpu" and (lost or (few and _is_small(tensors, few)))):
            return "reference"
        for candidate in _in_order(op, device, tensors):
            if candidate in BACKENDS and not missing(op, candidate):
                return candidate
        _warn(op, device, slower)
        return "reference"
    if name != "reference":
        if device != ("cpu" if name == "cpu" else "cuda") and not (name == "triton" and interpreting()):
            raise ValueError(f"backend={name!r} cannot serve tensors on {device}")
        if not fits:
            raise TypeError(f"backend={name!r} takes {', '.join(map(str, dtypes))}, got {tensors[0].dtype}")
        if reason := missing(op, name):
            raise ValueError(f"backend={name!r} is not available for {op}: {reason}")
    return name


def _is_small(tensors: tuple[Tensor, ...], few: float) -> bool:
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and not torch.compiler.is_compiling()
    return wanted and sum(t.numel() for t in tensors) <= few


def _in_order(op: str, device: str, tensors: tuple[Tensor, ...]) -> tuple[str, ...]:
    """What to try: the backend that was measured as the fastest, compiled, Triton."""
    if _calls is not None and not torch.compiler.is_compiling():
        _calls.append((op, device, tensors[0].dtype, sum(t.numel() for t in tensors)))
    order = ("cuda", "triton") if device == "cuda" else (device,)
    measured = _measured.ranges(op, device, tensors[0].dtype)
    if len(measured) <= 1:  # no size needed, which would bind a compiled graph to it
        return (*(backend for _, backend in measured), *order)
    elements = sum(t.numel() for t in tensors)
    return (next(backend for limit, backend in measured if elements <= limit), *order)


_calls: list[tuple[str, str, torch.dtype, int]] | None = None


@contextmanager
def recorded() -> Iterator[list[tuple[str, str, torch.dtype, int]]]:
    """(op, device, dtype, elements) of every automatic choice within the block, the key of `_measured`."""
    global _calls
    before, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = before


def report() -> list[tuple[str, str, bool, str]]:
    """(op, backend, available, reason when not) for every op and backend."""
    here = os.path.dirname(__file__)
    ops = [module.name for module in pkgutil.iter_modules([here]) if not module.name.startswith("_")]
    return [(op, name, not missing(op, name), missing(op, name)) for op in ops for name in BACKENDS]


# What serves a choice of backend. Every library holds the same ops: same schema, fake and gradient.
_libraries = {"cpu": "pyvseg", "cuda": "pyvseg", "triton": "pyvseg_triton"}
_triton = torch.library.Library("pyvseg_triton", "DEF")  # noqa: TOR901
_fakes: dict[str, Callable] = {}
_gradients: dict[str, tuple[Callable, Callable]] = {}
_functions: dict[tuple[str, str], type[torch.autograd.Function]] = {}


def kernels(choice: str):
    """The library of the chosen backend, whose `memory_read` is that backend's op."""
    return getattr(torch.ops, _libraries[choice])


def call(choice: str, op: str, *args):
    """Runs the op of the chosen backend. Eager calls go around the layers of Python between an op and its kernel that
    `torch.library` puts there for tracing: they take longer than a small op."""
    if torch.compiler.is_compiling():
        return getattr(kernels(choice), op)(*args)
    library = _libraries[choice]
    if torch.is_grad_enabled() and extension.requires_grad(args):
        function = None if torch._C._are_functorch_transforms_active() else _functions.get((library, op))
        return function.apply(*(_flat(args) if function.lists else args)) if function else _overload(library, op)(*args)
    with _below_autograd():
        return _overload(library, op)(*args)


@functools.cache
def _overload(library: str, op: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, library), op).default


class _Overloads:
    """`torch.ops.<library>` whose ops are overloads, which are quicker to call."""

    def __init__(self, library: str) -> None:
        self._library = library

    def __getattr__(self, op: str) -> torch._ops.OpOverload:
        return _overload(self._library, op)


_overloads = functools.cache(_Overloads)
_below_autograd = torch._C._AutoDispatchBelowAutograd


def _flat(args: tuple) -> list:
    """Tensors of lists one by one, as an autograd.Function wants them, and last how to put them together again."""
    lengths = [len(x) if isinstance(x, list) and isinstance(x[0], Tensor) else None for x in args]
    return [each for x, n in zip(args, lengths) for each in ([x] if n is None else x)] + [lengths]


def _unflat(flat: tuple) -> list:
    *flat, lengths = flat
    rest = iter(flat)
    return [next(rest) if n is None else [next(rest) for _ in range(n)] for n in lengths]


def schema(op: str) -> str:
    """As the compiled library declares it: "memory_read(Tensor memory_key, ...) -> (Tensor, Tensor, Tensor)"."""
    return str(getattr(torch.ops.pyvseg, op).default._schema).removeprefix("pyvseg::")


def register_fake(op: str) -> Callable[[Callable], Callable]:
    """Decorates the fake of an op (the shapes, strides and dtypes of its results), as `torch.library.register_fake`.

    It also declares the op to Triton, whose implementation is the function `op` of `pyvseg/kernels/<file of the fake>.py`.
    """

    def register(fake: Callable) -> Callable:
        if not hasattr(torch.ops.pyvseg, op):
            return fake  # not compiled: only the reference will run
        _fakes[op] = fake
        torch.library.register_fake(f"pyvseg::{op}", fake)
        _declare(_triton, op)
        for key in ("CUDA", "CPU"):
            _triton.impl(op, _triton_kernel(fake.__module__.rpartition(".")[2], op), key)
        return fake

    return register


def register_autograd(op: str, backward: Callable, *, setup_context: Callable) -> None:
    """The gradient of an op, as `torch.library.register_autograd`; `ctx.kernels` is the library that ran the forward."""
    if op in _fakes:
        _gradients[op] = (backward, setup_context)
        for library in ("pyvseg", _triton.ns):
            _differentiate(library, op)


def add_library(name: str) -> torch.library.Library:
    """Declares every op once more under another name, for other implementations: those of the tests' CUDA emulator."""
    library = torch.library.Library(name, "DEF")  # noqa: TOR901
    for op in _fakes:
        _declare(library, op)
    for op in _gradients:
        _differentiate(name, op)
    return library


def _declare(library: torch.library.Library, op: str) -> None:
    library.define(schema(op))
    torch.library.register_fake(f"{library.ns}::{op}", _fakes[op])


def _differentiate(library: str, op: str) -> None:
    backward, save = _gradients[op]

    def setup_context(ctx, inputs, output) -> None:
        ctx.kernels = _overloads(library)
        save(ctx, inputs, output)

    torch.library.register_autograd(f"{library}::{op}", backward, setup_context=setup_context)

    class Direct(torch.autograd.Function):
        lists = "Tensor[]" in schema(op)

        @staticmethod
        def forward(ctx, *inputs):  # a setup_context of its own takes PyTorch longer than a small op
            if Direct.lists:
                inputs = _unflat(inputs)
            with _below_autograd():
                output = _overload(library, op)(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            given = backward(ctx, *grads)
            if not Direct.lists:
                return given
            return *(each for x in given for each in (x if isinstance(x, list) else [x])), None

    _functions[library, op] = Direct


def _triton_kernel(module: str, op: str) -> Callable:
    def run(*args):
        with torch.cuda.device_of(args[0]):  # Triton launches on the current GPU, whatever the tensors'
            return getattr(importlib.import_module(f"pyvseg.kernels.{module}"), op)(*args)

    return run
