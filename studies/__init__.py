"""What pruning and training do to real models, on real data: `python -m studies`. Results: docs/training.md."""
