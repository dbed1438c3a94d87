"""What is known about a run outside its folder: the journal, the MLflow run, registered models."""
