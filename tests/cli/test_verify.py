# SPDX-License-Identifier: Apache-2.0
from pyvseg.cli.main import main
from tests.conftest import shared


def test_exit_status(capsys, tmp_path):
    case = str(shared("parity", "metrics-vos"))
    assert main(["verify", case, "--quiet"]) == 0
    assert capsys.readouterr().out == "metrics-vos: ok, 70 tensors agree\n"
    assert main(["verify", str(tmp_path), case, "--quiet"]) == 1
    assert main(["verify"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("pyvseg: error: no case to verify")
