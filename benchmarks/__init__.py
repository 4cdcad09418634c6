"""Measurements of eventfold, beside what people would pick instead: `python -m benchmarks`; see docs/benchmarks.md."""
