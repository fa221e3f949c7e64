"""How a model is cut over a cluster: which plan, why, and what each rank then holds."""
