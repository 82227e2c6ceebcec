"""A private cluster's processes end with it, whoever started them and whoever is left of those."""

import subprocess
import sys

# A parent that is killed at once leaves a grandchild behind, as a raylet does its workers.
LEAVE_AN_ORPHAN = """
import subprocess, sys, time
import psutil
from deployments import private_cluster
from deployments.edge import Edge
from serve_app.config import AppConfig

cluster = private_cluster.PrivateCluster(AppConfig(), Edge.DIRECT)
private_cluster._adopt_orphans()
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
start = f"import subprocess; print(subprocess.Popen({sleep}, stdout=subprocess.DEVNULL).pid)"
parent = subprocess.run([sys.executable, "-c", start], stdout=subprocess.PIPE, check=True)
orphan = psutil.Process(int(parent.stdout))
assert orphan.is_running() and orphan.ppid() == psutil.Process().pid
bystander = psutil.Popen(sleep)
cluster._end_children(time.monotonic(), [psutil.Process(bystander.pid)])
print(orphan.is_running(), bystander.is_running())
cluster.kill()
print(bystander.is_running())
"""


def test_orphans_are_ended_and_bystanders_are_not() -> None:
    ended = subprocess.run([sys.executable, "-c", LEAVE_AN_ORPHAN], capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == ["False", "True", "False"], ended.stderr
