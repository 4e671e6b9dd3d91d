"""Recipes and tables of papers: find them by name, copy or import them into a params.yaml, rerun and judge them."""
