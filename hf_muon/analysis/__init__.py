"""What trained weights look like: spectra of matrices, and the groups that the paper averages them in."""
