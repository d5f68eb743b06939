"""The pipeline: configuration, data plane, loop, tracking. Imports models, never jobs."""
