"""The chain: plan, run, skip, record. Knows stages as callables; never imports torch or vllm, ray.data in parts.py alone.

Read in this order: artifact, fingerprint, stage, parts, runner.
"""
