"""Any image source -> a prepared data set; `job.prepare` is the entry point."""
