"""The loops over a network: sampling, editing, training, likelihood. They know nothing of files."""
