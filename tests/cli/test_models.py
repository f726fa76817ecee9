# SPDX-License-Identifier: Apache-2.0
from pyvseg.cli.main import main
from pyvseg.models.zoo import ZOO


def test_every_variant_has_a_row_below_its_system(capsys):
    assert main(["models"]) == 0
    heading, listed = "", []
    for line in capsys.readouterr().out.splitlines()[:-1]:
        if not line.startswith("  "):
            heading = line or heading
            continue
        variant = ZOO[line.split()[0]]
        listed.append(variant.name)
        assert heading == f"{variant.system}: {variant.task}; licence of the weights: {variant.licence}"
        assert variant.file in line or variant.where == "bundled"
        assert all(result in line for result in variant.published.values())
    assert listed == list(ZOO)


def test_words_choose(capsys):
    assert main(["models", "CTVIS", "ovis"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == ["ctvis_r50_ovis", "ctvis_swin_l_ovis"]


def test_words_that_fit_nothing(capsys):
    assert main(["models", "ctvis", "panoptic"]) != 0
    assert "no model has ctvis and panoptic" in capsys.readouterr().err
