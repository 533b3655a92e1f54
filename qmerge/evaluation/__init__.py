"""Judge what was written: fidelity of the whole model, integrity of the folder, and whether stock loaders take it."""
