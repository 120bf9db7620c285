"""Exact conversion between checkpoints of supported families and their Attention Residuals form."""
