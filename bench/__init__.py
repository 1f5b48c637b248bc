"""Benchmarks, one file per question: ``python -m bench verify``. Results go to bench/results/<gpu>/<question>.json."""
