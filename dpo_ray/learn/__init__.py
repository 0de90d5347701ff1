"""What DPO computes: torch and transformers only, usable without the rest of dpo_ray."""
