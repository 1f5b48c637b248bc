"""Training drafts: the target's answers as data, losses against the target's law, transformers' Trainer underneath."""
