# SPDX-License-Identifier: Apache-2.0
"""Memory does not grow with the length of the video."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.video.clips import images, write_video

HEIGHT, WIDTH = 120, 160
CODE = """
import sys
from pyvseg.engine.run import run
from tests.engine.standin import standin
from tests.video.clips import square
run(standin(), sys.argv[1], {0: square(1, 120, 160)}, out=sys.argv[2], progress=False)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))  # peak of this program alone, KiB
"""


def peak_kib(video, out) -> int:
    done = subprocess.run([sys.executable, "-c", CODE, str(video), str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc/self/status, which only Linux has")
def test_resident_memory_for_300_and_3000_frames(tmp_path):
    """The same content ten times as long. Kept frames would take 155 MB more, kept label images 52 MB."""
    content = images(300, HEIGHT, WIDTH)
    short = write_video(tmp_path / "short.mp4", content, rate=30)
    long = write_video(tmp_path / "long.mp4", content * 10, rate=30)
    peaks = {name: peak_kib(path, tmp_path / f"out-{name}") for name, path in (("short", short), ("long", long))}
    print(f"peak resident memory: {peaks} KiB")
    assert len(list((tmp_path / "out-long" / "masks").iterdir())) == 3000
    assert peaks["long"] - peaks["short"] < 16 * 1024
