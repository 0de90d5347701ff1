"""Preference losses: free functions over (B,) tensors, B pairs. The reduction is the caller's.

Read pairs.py first (what a loss gets), then pairwise.py (DPO and its kin). anchored.py pushes each side by itself,
whole_batch.py sorts the global batch, reference_free.py needs no reference. divergences.py and modifiers.py change what goes
in; terms.py adds losses up. A loss is looked up by name in `LOSSES`, or called as e.g. `losses.pairwise.ipo`.
"""

from dpo_ray.learn.losses.modifiers import desensitise as desensitise
from dpo_ray.learn.losses.modifiers import desensitised_sums as desensitised_sums
from dpo_ray.learn.losses.modifiers import wpo_weights as wpo_weights
from dpo_ray.learn.losses.pairs import ImplicitRewards as ImplicitRewards
from dpo_ray.learn.losses.pairs import PairLogps as PairLogps
from dpo_ray.learn.losses.pairs import implicit_rewards as implicit_rewards
from dpo_ray.learn.losses.terms import LOSSES as LOSSES
from dpo_ray.learn.losses.terms import Term as Term
from dpo_ray.learn.losses.terms import check_whole_batch as check_whole_batch
from dpo_ray.learn.losses.terms import needs_mean_chosen_tokens as needs_mean_chosen_tokens
from dpo_ray.learn.losses.terms import needs_reference as needs_reference
from dpo_ray.learn.losses.terms import needs_scores as needs_scores
from dpo_ray.learn.losses.terms import total_loss as total_loss
from dpo_ray.learn.losses.whole_batch import WHOLE_BATCH as WHOLE_BATCH
