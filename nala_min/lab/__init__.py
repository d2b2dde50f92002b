"""Programs that measure the rest: speed (bench), fair comparisons (compare) and what they compare
(studies), norms in the models that they train (premise), and all GPU measurements (gpu)."""
