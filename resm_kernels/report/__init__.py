"""What people see of a merge: progress, the model card, tables."""
