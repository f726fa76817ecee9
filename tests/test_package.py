# SPDX-License-Identifier: Apache-2.0
"""An installed copy holds all that the source tree does, also where the installation is not an editable one."""

from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parents[1]


def test_every_folder_of_modules_is_installed():
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "pyvseg").rglob("*.py") if "kernels" not in file.parts}
    packages = {Path(*name.split(".")) for name in find_packages(str(ROOT), include=["pyvseg", "pyvseg.*"])}
    assert folders <= packages, f"no __init__.py in {sorted(map(str, folders - packages))}"
