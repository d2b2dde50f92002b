"""Programs that measure the rest of the package: speed (bench), fair comparisons (compare) of the
attentions in studies, norms in trained models (premise), and everything on a GPU (gpu)."""
