"""The operator: kopf watches and runs the process, our own level-based reconciler does the work."""
