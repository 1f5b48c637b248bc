"""The decode-time transformer on a static cache; vision towers and processors stay those of transformers."""
