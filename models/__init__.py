"""The iTPN models and objectives. Needs torch and timm only: never Ray, MLflow or pyarrow."""
