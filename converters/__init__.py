"""Checkpoints of Hugging Face to bundles.  Needs neither torch nor transformers, and runs no code of a checkpoint."""
