"""Pictures for people to look at: grids and animations of samples, and figures of the theory."""
