"""Generation engines: start, generate(requests) for any policy, close. Used by generate and evaluate.

Read pool.py first; vllm.py and hf.py each turn token ids into sampled token ids.
"""
