"""What is done to the process beside running operators."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, torch
from elastic_cache.native import release_workers
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
torch.add(torch.ones(10**6), 1)
during = count()
release_workers()
print(during > before, count() == before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="there is no /proc")
def test_workers_end_when_they_are_released() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "True"]
