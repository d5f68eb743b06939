"""The forms a trained model is exported in."""
