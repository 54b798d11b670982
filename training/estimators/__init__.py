"""Estimators: heads, probes and an extractor with the manners of scikit-learn's."""
