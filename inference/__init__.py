"""The engines and what comes out of them: filters, smoothers, posteriors, metrics."""
