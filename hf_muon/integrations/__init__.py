"""The only rooms that import transformers and its relatives: each adapts, none computes."""
