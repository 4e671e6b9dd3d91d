"""Many runs: which there are, how far each is, and training what is missing."""
