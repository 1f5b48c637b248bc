"""The paper's study, repeated with the miniature: ``python -m bench.study --out DIR``."""
