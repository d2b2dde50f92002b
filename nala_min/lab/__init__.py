"""Programs that measure the rest of the package: speed (bench.py), and fair comparisons of the
attentions (compare.py) in studies (studies.py)."""
