"""The serving frameworks that this service is compared with: a small server of each, in an environment of its own."""
