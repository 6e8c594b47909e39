"""Recipes for the rows of the papers' tables. `python -m configs.generate` writes them from the tables here."""
