"""Speed (bench.py), and fair comparisons of attentions (compare.py) in studies (studies.py)."""
