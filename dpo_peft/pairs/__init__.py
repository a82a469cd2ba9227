"""Preference pairs from answers of a model: sample, judge, pair."""
