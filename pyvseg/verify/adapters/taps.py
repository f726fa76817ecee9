# SPDX-License-Identifier: Apache-2.0
"""Looking at what passes between the parts of a model."""

from __future__ import annotations

from torch import Tensor, nn


class Taps:
    """Inputs and outputs of the model's parts, call by call, as numpy arrays.

    names   of the parts, as in `named_modules`; None: the direct children
    """

    def __init__(self, model: nn.Module, names: list[str] | None = None) -> None:
        self.calls: dict[str, list[tuple]] = {}
        names = [name for name, _ in model.named_children()] if names is None else names
        self.hooks = [model.get_submodule(name).register_forward_hook(self._recorder(name)) for name in names]

    def _recorder(self, name: str):
        def record(part: nn.Module, inputs: tuple, output) -> None:
            self.calls.setdefault(name, []).append((_arrays(inputs), _arrays(output)))

        return record

    def inputs(self, name: str, call: int) -> tuple:
        return self.calls[name][call][0]

    def outputs(self, name: str, call: int):
        return self.calls[name][call][1]

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _arrays(value):
    if isinstance(value, Tensor):
        return value.detach().numpy()
    return [_arrays(v) for v in value] if isinstance(value, list | tuple) else value
