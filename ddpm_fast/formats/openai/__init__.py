"""improved-diffusion and guided-diffusion: their checkpoints as models of ours, and ours as theirs."""
