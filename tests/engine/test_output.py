# SPDX-License-Identifier: Apache-2.0
"""Videos that finish at the same time share a manifest and folders."""

import json
from concurrent.futures import ThreadPoolExecutor

from pyvseg.engine.output import UNFINISHED, Targets, VideoOutput


def test_many_videos_finish_at_once(tmp_path):
    def whole(name: str) -> None:
        output = VideoOutput(Targets(tmp_path, tmp_path / UNFINISHED / name, {"a.json": tmp_path / "found" / f"{name}.json"}), name, {"of": name})
        output.open(0)
        (output.targets.work / "a.json").write_text(name)
        output.finish()

    names = [f"v{i}" for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(whole, names))
    assert json.loads((tmp_path / "manifest.json").read_text()) == {name: {"of": name} for name in names}
    assert len(list((tmp_path / "found").iterdir())) == 200 and not (tmp_path / UNFINISHED).exists()
