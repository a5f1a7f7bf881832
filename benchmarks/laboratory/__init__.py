"""The laboratory of `benchmarks/learning.py`: text, contenders, training, cases and reports."""
