# SPDX-License-Identifier: Apache-2.0
"""The hot paths as public functions. One file per op: contract, PyTorch reference, autograd; kernels in csrc/ and kernels/.

Every module here without a leading underscore is an op; what its `__all__` names is public as `pyvseg.ops.<name>`.
"""

import importlib
import pkgutil

from pyvseg.ops._dispatch import backend, report

__all__ = ["backend", "report"]

for _found in pkgutil.iter_modules(__path__):
    if not _found.name.startswith("_"):
        _op = importlib.import_module(f"{__name__}.{_found.name}")
        globals().update({_name: getattr(_op, _name) for _name in _op.__all__})
        __all__ += _op.__all__
