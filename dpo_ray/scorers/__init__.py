"""Ways to judge a completion: one file each. A score is a float, higher is better."""
