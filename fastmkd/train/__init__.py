"""Training layer: recipes, data, the training loop and the command line (``pip install -e ".[train]"``)."""
