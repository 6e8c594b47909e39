"""Runs described by a recipe. `run` needs the `train` extra: `pip install 'weightlora[train]'`."""
