"""What DPO computes: torch and transformers only, usable without the rest of dpo_ray."""

LOGPS_VERSION = 2
"""Of logps.py; raise it when the same inputs give other values, and cached reference values go stale. Here, so that
planning a run does not import torch."""
