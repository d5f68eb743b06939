"""The one-page HTML report of a run: one file, no network, no scripts."""
