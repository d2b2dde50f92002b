"""Programs that measure the rest: speed (bench), fair comparisons (compare) and what they compare
(studies), and norms in the models that they train (premise)."""
