"""Recipes by name: training recipes, the papers' cells, into a params.yaml, out of files of others."""
