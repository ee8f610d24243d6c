"""Measurements of this project: `python -m benchmarks.<name>`; results/ has what they wrote."""
