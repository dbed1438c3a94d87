"""Scores under named protocols: metrics, restoring images, baselines, summaries, reports."""
