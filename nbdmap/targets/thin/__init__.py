"""Thin provisioning: thin-pool and thin (reference g, h)."""
