"""What hyperparameters are made of: canonical numbers and flags, and how values travel."""
