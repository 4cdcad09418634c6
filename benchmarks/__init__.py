"""Benchmarks of eventfold and its alternatives: `python -m benchmarks`; see docs/benchmarks.md."""
