# SPDX-License-Identifier: Apache-2.0
"""A batch on a Ray cluster of two nodes, both on this machine, each with processes of its own."""

import json
import os
import signal
import socket
import threading
import time

import pytest

from pyvseg.engine.cluster import Cluster, Watch
from pyvseg.errors import PyvsegError
from tests.conftest import ROOT
from tests.engine.standin import StandinRecipe
from tests.engine.test_batch import clips, files, go, undisturbed  # noqa: F401  (two are fixtures)

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'pyvseg[ray]')")


@pytest.fixture
def cluster(monkeypatch):
    from ray.cluster_utils import Cluster as Nodes

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_health_check_timeout_ms", "2000")
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [nodes.add_node(num_cpus=1) for _ in range(2)]
    yield nodes, workers
    ray.shutdown()
    nodes.shutdown()


def running(name: bytes) -> list[int]:
    """Processes of Ray that are at work on a task of that name."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            title = open(f"/proc/{pid}/cmdline", "rb").read()
        except OSError:
            continue
        if title.startswith(b"ray::") and name in title:
            found.append(int(pid))
    return found


def disturb(out, killed, cluster):
    """Kills a process that segments a video, then a whole node."""
    nodes, workers = cluster
    while not any((out / "unfinished").glob("*/masks/*.png")):
        time.sleep(0.02)
    killed += running(b"_segment")[:1]
    os.kill(killed[0], signal.SIGKILL)
    time.sleep(0.5)
    nodes.remove_node(workers[0], allow_graceful=False)
    killed.append("node")


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="finds the processes to kill by Linux's /proc")
def test_a_killed_process_and_a_killed_node(clips, tmp_path, undisturbed, cluster):  # noqa: F811
    out, killed = tmp_path / "out", []
    thread = threading.Thread(target=disturb, args=(out, killed, cluster), daemon=True)
    thread.start()
    report = go(clips, out, StandinRecipe(delay=0.1), execute=Cluster(cluster[0].address), profile=tmp_path / "trace.json")
    thread.join(30)
    assert len(killed) == 2 and (report.done, report.failed) == (6, [])
    assert files(out) == undisturbed and 0 < report.busy["model"] <= 1
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {e["args"]["video"] for e in events if "args" in e} == set("abcdef")


def test_a_head_that_is_gone():
    """Half a minute is forgiven; then one line, before Ray ends the program."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        watch = Watch("auto", f"127.0.0.1:{server.getsockname()[1]}", heard=0)
        assert watch.answers() and watch.heard > 0
    assert not watch.answers()
    watch.heard -= 31
    with pytest.raises(PyvsegError, match="--ray auto: the Ray cluster does not answer any more .*refused"):
        watch.answers()


def test_no_cluster(clips, tmp_path):  # noqa: F811
    with pytest.raises(PyvsegError, match="--ray 127.0.0.1:1: no Ray cluster answers there"):
        go(clips, tmp_path / "out", execute=Cluster("127.0.0.1:1"))
