# SPDX-License-Identifier: Apache-2.0
import torch

from pyvseg.cli.info import info
from pyvseg.ops import _dispatch, report


def test_info_says_what_is_here(capsys):
    info()
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert f"{_dispatch.extension.isa()} in use" in out
    for op, _, available, reason in report():
        assert op in out
        assert available or reason in out
