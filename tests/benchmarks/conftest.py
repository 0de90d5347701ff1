"""The benchmarks are scripts: their modules find each other because they lie beside the one that is run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
