"""Metaplastic mean-field learning (MESU): predict, update, smooth, one number of uncertainty a weight."""
