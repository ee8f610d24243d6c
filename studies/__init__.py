"""What pruning, training and rounding do to real models, on real data: `python -m studies`. Results: docs/training.md,
docs/quantisation.md."""
