"""diffusers: its folders as models of ours, ours as its folders, and what its schedulers are made of."""
