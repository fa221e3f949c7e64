"""Any other causal language model that transformers knows, cut by DeepSpeed AutoTP, over our paged cache.

Nothing but `workers.assemble` imports this, and only for such a model: transformers takes seconds to import.
"""
