"""The embedded default: a policy small enough for a laptop, prompts for it, and a scorer that it can learn to please.

The controlled-sentiment experiment of the DPO paper (section 6.1, arXiv:2305.18290) in miniature: the policy writes
reviews of mixed sentiment, the scorer prefers well-formed positive ones, and one round shifts the policy towards them.
"""
