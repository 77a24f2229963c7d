"""Times jaxbn beside its peers and beside the memory traffic that nobody can go below."""
