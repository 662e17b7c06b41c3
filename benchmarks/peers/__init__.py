"""The serving frameworks that this service is compared with: one small server for each, in an environment of its own."""
