"""Hessian-aware low-rank perturbation (HALRP): each task's weights are a cheap transformation of a base."""
