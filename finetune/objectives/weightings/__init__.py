"""Loss weights by timestep: each is one file here, found by `WEIGHTINGS`."""
