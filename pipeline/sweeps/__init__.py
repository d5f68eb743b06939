"""Many fine-tuning runs of one recipe; `pipeline.sweep.run_sweep` is the entry point."""
