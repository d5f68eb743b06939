"""The three downstream tasks: their samples, losses, predictions and scores."""
