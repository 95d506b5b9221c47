"""How the zoo's own models were trained: one file a model, run again by `luthier zoo train NAME --out DIR`."""
