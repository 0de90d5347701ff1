import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FREED_MIB = 480
SCRIPT = f"""
import sys, psutil, torch
from dpo_ray.learn.heap import give_back_large_tensors

if sys.argv[1] == "True":
    assert give_back_large_tensors()
torch.ones(31 << 18)  # glibc keeps blocks of this size once it has seen one freed
large, small = [], []
for _ in range({FREED_MIB} // 8):
    large.append(torch.ones(8 << 18))
    small.append(torch.ones(8 << 10))
before = psutil.Process().memory_info().rss
large.clear()
print((before - psutil.Process().memory_info().rss) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_tensors_that_are_freed_go_back_to_the_system():
    def given_back(asked: bool) -> int:
        return int(subprocess.check_output([sys.executable, "-c", SCRIPT, str(asked)], cwd=ROOT))

    assert given_back(True) > 0.95 * FREED_MIB
    assert given_back(False) < 0.1 * FREED_MIB
