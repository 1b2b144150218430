"""Commands that start runs: on this machine, on clusters, and sweeps."""
