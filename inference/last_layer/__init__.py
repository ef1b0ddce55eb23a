"""Bayesian last-layer updates in closed form, removal of data, and active learning with them."""
