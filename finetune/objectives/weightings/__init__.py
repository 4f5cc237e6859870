"""Loss weights by timestep. Each is one file here; the registry `WEIGHTINGS` finds it."""
