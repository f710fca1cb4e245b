"""Evaluation of exported models with transformers alone, apart from the trainer's own numbers."""
