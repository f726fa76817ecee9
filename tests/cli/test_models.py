# SPDX-License-Identifier: Apache-2.0
from pyvseg.cli.main import main
from pyvseg.models.zoo import ZOO


def test_every_variant_has_a_row(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[: lines.index("")]
    assert table[0].split() == ["name", "task", "system", "weights", "licence"]
    assert [line.split()[0] for line in table[1:]] == list(ZOO)
    for line, variant in zip(table[1:], ZOO.values()):
        assert line.endswith(variant.licence)
        assert variant.file in line or variant.where == "bundled"
